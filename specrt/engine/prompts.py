"""The forms in which users give prompts and parameters, brought to one."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

from specrt.checks import refuse
from specrt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from specrt.text.tokenizer import Tokenizer


def prompt_list(prompts: Any, chat: bool) -> list[Any]:
    """One entry a prompt: strings, token id lists, or with ``chat`` message lists. A single prompt becomes a list of one."""
    if chat:
        what = "a list of messages {'role': ..., 'content': ...}, or a list of such lists"
        if not isinstance(prompts, (list, tuple)) or not prompts:
            raise refuse("prompts", prompts, what)
        return [list(prompts)] if isinstance(prompts[0], dict) else list(prompts)
    what = "a string, a list of token ids, or a non-empty list of those"
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise refuse("prompts", prompts, what)
    if any(isinstance(p, Integral) for p in prompts):
        return [list(prompts)]
    return list(prompts)


def prompt_tokens(prompt: Any, chat: bool, tokenizer: Tokenizer | None) -> list[Any]:
    """Token ids of one prompt, the chat template included. ValueError if it is none of the forms; the ids are checked by the engine."""
    if not chat and isinstance(prompt, (list, tuple)):
        return list(prompt)
    if chat and not isinstance(prompt, (list, tuple)):
        raise refuse("prompt", prompt, "a list of messages {'role': ..., 'content': ...}")
    if not chat and not isinstance(prompt, str):
        raise refuse("prompt", prompt, "a string or a list of token ids")
    if tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer; prompts must be lists of token ids")
    if chat:
        return tokenizer.encode(tokenizer.apply_chat_template(list(prompt)), bos=False)
    if not prompt:
        raise ValueError("the prompt is empty; it must have at least one token")
    return tokenizer.encode(prompt)


def params_list(params: Any, prompts: int) -> list[SamplingParams]:
    """One SamplingParams a prompt: one for all, None for the defaults, or a list as long as the prompts."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * prompts
    if not isinstance(params, (list, tuple)) or any(not isinstance(p, SamplingParams) for p in params):
        raise refuse("params", params, "a SamplingParams, or a list with one for each prompt")
    if len(params) != prompts:
        raise ValueError(f"params has {len(params)} entries for {prompts} prompts; give one SamplingParams for all, or a list with one for each")
    return list(params)
