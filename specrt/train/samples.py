"""Samples: prompts with the target's own answers, as token ids; a file of JSON lines whose first says how they were made."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrt import LLM, SamplingParams
from specrt.train.prompts import Conversation

_CHUNK = 16  # conversations in work, in batches of the engine: between two chunks the batch runs empty


@dataclass(frozen=True)
class Sample:
    """ids: prompt and answer, the token that ended it included; prompt: how many are the prompt's."""

    category: str
    ids: list[int]
    prompt: int

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.prompt]


def capture(llm: LLM, conversations: list[Conversation], path: Path, how: dict[str, Any], advance: Callable[[int], None] = lambda n: None) -> int:
    """Answers every turn, ``how["repeats"]`` times, at the temperatures in turn, and appends to the file; conversations that are there already are passed over. Returns how
    many turns were left out: too long for the model, or failed. ValueError if the file was made in another way."""
    done = _begin(path, how)
    temperatures, repeats = how["temperatures"], how["repeats"]
    work = [(f"{c.id}/{r}", c, temperatures[(i + r) % len(temperatures)], how["seed"] + i * repeats + r) for i, c in enumerate(conversations) for r in range(repeats)]
    advance(sum(name in done for name, *_ in work))
    work = [w for w in work if w[0] not in done]
    left_out, size = 0, _CHUNK * llm.config.max_batch_size
    with open(path, "a", encoding="utf-8") as file:
        for at in range(0, len(work), size):
            lines, missing = _answered(llm, work[at : at + size], how["max_tokens"])
            left_out += missing
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            advance(len(work[at : at + size]))
    return left_out


def _begin(path: Path, how: dict[str, Any]) -> set[str]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(how) + "\n", encoding="utf-8")
        return set()
    header, lines = _read(path)
    for key, value in how.items():
        if header.get(key) != value:
            raise ValueError(f"{path} was captured with {key} = {header.get(key)!r}, and now {value!r} is asked for; name another file, or remove it")
    return {line["id"] for line in lines}


def _answered(llm: LLM, work: list[tuple], max_tokens: int) -> tuple[list[dict[str, Any]], int]:
    """The lines of some conversations, turn by turn (each against the model's own earlier answers), and how many turns are missing."""
    chats = [list(c.history) for _, c, _, _ in work]
    lines, missing = [], 0
    for turn in range(max(len(c.turns) for _, c, _, _ in work)):
        asked = []
        for (name, c, temperature, seed), chat in zip(work, chats):
            if turn >= len(c.turns) or len(chat) != len(c.history) + 2 * turn:  # over, or an earlier turn is missing
                missing += turn < len(c.turns)
                continue
            chat.append({"role": "user", "content": c.turns[turn]})
            ids = prompt_ids(llm.tokenizer, chat)
            if len(ids) + 2 > llm.config.max_model_len:
                missing += 1
                continue
            params = SamplingParams(temperature=temperature, seed=seed, max_tokens=min(max_tokens, llm.config.max_model_len - len(ids)))
            asked.append((name, c, chat, ids, params))
        outputs = llm.generate([a[3] for a in asked], [a[4] for a in asked]) if asked else []
        for (name, c, chat, ids, params), output in zip(asked, outputs):
            if output.finish_reason == "error" or len(output.token_ids) < 2:
                missing += 1
                continue
            chat.append({"role": "assistant", "content": output.text})
            lines.append({"id": name, "category": c.category, "temperature": params.temperature, "prompt": len(ids), "ids": ids + output.token_ids})
    return lines, missing


def prompt_ids(tokenizer: Any, chat: list[dict[str, str]]) -> list[int]:
    """By the chat template; of a model without one, the last message as it is."""
    if tokenizer.has_chat_template:
        return tokenizer.encode(tokenizer.apply_chat_template(chat), bos=False)
    return tokenizer.encode(chat[-1]["content"])


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of `specrt train capture`: {error}") from None
    if not rows or not isinstance(rows[0], dict) or "temperatures" not in rows[0] or not all(isinstance(r, dict) and {"id", "category", "prompt", "ids"} <= r.keys() for r in rows[1:]):
        raise ValueError(f"{path} is not a file of `specrt train capture`")
    return rows[0], rows[1:]


def read_files(paths: tuple[str, ...], vocab_size: int, max_length: int) -> tuple[list[dict[str, Any]], list[Sample]]:
    """``read_samples`` of several files, one after the other; ValueError also where they are not of one model."""
    read = [read_samples(path, vocab_size, max_length) for path in paths]
    headers = [header for header, _ in read]
    models = list(dict.fromkeys(h.get("model") for h in headers))
    if len(models) > 1:
        raise ValueError(f"the samples are of different models: {', '.join(map(repr, models))}")
    return headers, [sample for _, samples in read for sample in samples]


def read_samples(path: str | Path, vocab_size: int, max_length: int) -> tuple[dict[str, Any], list[Sample]]:
    """(how they were made, the samples, cut to ``max_length`` tokens). ValueError if the file is no such file, made with another vocabulary, or has nothing to learn from."""
    header, rows = _read(Path(path))
    samples = [Sample(row["category"], row["ids"][:max_length], row["prompt"]) for row in rows]
    samples = [s for s in samples if len(s.ids) >= max(s.prompt, 1) + 2]  # a slot, and a token that it says
    if not samples:
        raise ValueError(f"{path} has no sample with two answer tokens within max_length = {max_length}")
    largest = max(max(s.ids) for s in samples)
    if largest >= vocab_size:
        raise ValueError(f"{path} holds token {largest}, and the model has {vocab_size}: it was captured with another model ({header.get('model')!r})")
    return header, samples


def split(samples: list[Sample], held_out: int) -> tuple[list[Sample], list[Sample]]:
    """(to train on, held out): ``held_out`` prompts, the same ones whatever the order, with all their answers kept from training; one answer of each is returned."""
    prompts = sorted({tuple(s.prompt_ids) for s in samples}, key=lambda p: (zlib.crc32(repr(p).encode()), p))
    if len(prompts) <= held_out:
        raise ValueError(f"held_out = {held_out} leaves nothing of {len(prompts)} prompts to train on")
    kept = set(prompts[:held_out])
    first = {tuple(s.prompt_ids): s for s in reversed(samples) if tuple(s.prompt_ids) in kept}
    return [s for s in samples if tuple(s.prompt_ids) not in kept], [first[p] for p in prompts[:held_out]]
