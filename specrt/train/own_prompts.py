"""Prompts that a chat model makes up by itself: what it would have a user say, sampled after the template's opening of a user's turn (Magpie, arXiv:2406.08464)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specrt import LLM, SamplingParams

_CONTENT = "\ue000"  # of Unicode's private use: no template has it
_SHORTEST = 8  # characters of a prompt
_BATCHES = 16  # handed to the engine at once


def opening(tokenizer: Any) -> list[int]:
    """The tokens up to where a user's first message begins. ValueError if the model has no chat template, or one that does not show messages as they are."""
    if tokenizer is None or not tokenizer.has_chat_template:
        raise ValueError("the model has no chat template, in whose user turn it could make up prompts; write prompts of your own")
    before, found, _ = tokenizer.apply_chat_template([{"role": "user", "content": _CONTENT}]).partition(_CONTENT)
    if not found:
        raise ValueError("the chat template does not show a user's message as it is; write prompts of your own")
    return tokenizer.encode(before, bos=False)


def own_prompts(llm: LLM, tries: int, temperature: float, max_tokens: int, seed: int, advance: Callable[[int], None] = lambda n: None) -> list[str]:
    """Of ``tries`` (number i with seed + i), those that came to an end within max_tokens and are neither empty nor said before."""
    start, size = opening(llm.tokenizer), _BATCHES * llm.config.max_batch_size
    found: dict[str, None] = {}
    for at in range(0, tries, size):
        count = min(size, tries - at)
        params = [SamplingParams(temperature=temperature, seed=seed + at + i, max_tokens=max_tokens) for i in range(count)]
        outputs = llm.generate([start] * count, params)
        found |= {text: None for o in outputs if o.finish_reason == "stop" and len(text := o.text.strip()) >= _SHORTEST}
        advance(count)
    return list(found)
