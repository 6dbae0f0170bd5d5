"""SamplingParams: how one request's tokens are chosen, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from specrt.checks import boolean, integer, known_keys, number, refuse

#: Keys of ``SamplingParams.speculative`` when it is a dict.
SPECULATIVE_KEYS = ("method", "num_speculative_tokens", "num_steps", "eagle_topk", "num_draft_tokens")
MAX_LOGPROBS = 64
MAX_SAMPLES = 1024


class FrozenDict(dict):
    """A dict that stays as it was made, and so has a hash: requests that run read it."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("SamplingParams do not change after they are made; make new ones, for example with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are made whole, not key by key
        return FrozenDict, (dict(self),)


@dataclass(frozen=True, init=False)
class SamplingParams:
    """Sampling parameters of a request; checked when made, immutable afterwards (its dicts are ``FrozenDict``s), with a hash.

    temperature: 0 = greedy. top_k: 0 = off. top_p, min_p: nucleus and relative threshold, after temperature. repetition_penalty counts prompt and
    output, presence_penalty and frequency_penalty the output. logit_bias: {token id: added to its logit}. allowed_token_ids: all others are never
    chosen. token_mask: f(output token ids so far, list[int]) -> bool mask of the vocabulary (True: may follow); called for every node of a token
    tree, so it must not keep a position of its own, nor call its LLM.
    min_tokens: end-of-text, stop ids and stop strings cannot end the output before it. max_tokens: most output tokens. ignore_eos: end-of-text is a token like others.
    stop: a string or several; the text ends before it. stop_token_ids: end the output; kept in token_ids, not in the text.
    seed: signed 64-bit; None draws one. n: independent samples; sample i > 0 has a seed derived from (seed, i).
    logprobs: per token, the chosen one's log-probability and the n most likely, of the distribution sampled from. prompt_logprobs: the same for the
    prompt's tokens, of the model's own distribution.
    speculative: None = as the engine is configured, False = off, or a dict of ``SPECULATIVE_KEYS`` for this request."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    token_mask: Callable[[list[int]], Any] | None = None
    min_tokens: int = 0
    max_tokens: int = 64
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    speculative: bool | Mapping[str, Any] | None = None

    def __init__(self, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
                 presence_penalty: float = 0.0, frequency_penalty: float = 0.0, logit_bias: dict[int, float] | None = None,
                 allowed_token_ids: Any = None, token_mask: Callable[[list[int]], Any] | None = None, min_tokens: int = 0, max_tokens: int = 64,
                 ignore_eos: bool = False, stop: Any = None, stop_token_ids: Any = None, seed: int | None = None, n: int = 1,
                 logprobs: int | None = None, prompt_logprobs: int | None = None, speculative: bool | dict[str, Any] | None = None, **unknown: Any):
        known_keys("SamplingParams", unknown, self.__dataclass_fields__)
        if token_mask is not None and not callable(token_mask):
            raise refuse("token_mask", token_mask, "None or a callable: output token ids -> bool mask of the vocabulary")
        checked = dict(
            temperature=_temperature(temperature),
            top_k=integer("top_k", top_k, 0, 2**31 - 1),
            # Below 1e-6 only the most likely token is left anyway; the device's float32 must not make it 0.
            top_p=max(number("top_p", top_p, 5e-324, 1.0, "a number in (0, 1]; 1 = off"), 1e-6),
            min_p=number("min_p", min_p, 0.0, 1.0, "a number in [0, 1]; 0 = off"),
            repetition_penalty=number("repetition_penalty", repetition_penalty, 1e-4, 1e4, "a number from 1e-4 to 1e4; 1 = off"),
            presence_penalty=number("presence_penalty", presence_penalty, -2.0, 2.0, "a number in [-2, 2]; 0 = off"),
            frequency_penalty=number("frequency_penalty", frequency_penalty, -2.0, 2.0, "a number in [-2, 2]; 0 = off"),
            logit_bias=_logit_bias(logit_bias),
            allowed_token_ids=None if allowed_token_ids is None else _token_ids("allowed_token_ids", allowed_token_ids, empty=False),
            token_mask=token_mask,
            max_tokens=integer("max_tokens", max_tokens, 1, 2**31 - 1),
            ignore_eos=boolean("ignore_eos", ignore_eos),
            stop=_stop(stop),
            stop_token_ids=() if stop_token_ids is None else _token_ids("stop_token_ids", stop_token_ids, empty=True),
            seed=None if seed is None else integer("seed", seed, -(2**63), 2**63 - 1),
            n=integer("n", n, 1, MAX_SAMPLES),
            logprobs=None if logprobs is None else integer("logprobs", logprobs, 0, MAX_LOGPROBS),
            prompt_logprobs=None if prompt_logprobs is None else integer("prompt_logprobs", prompt_logprobs, 0, MAX_LOGPROBS),
            speculative=_speculative(speculative),
        )
        checked["min_tokens"] = integer("min_tokens", min_tokens, 0, checked["max_tokens"])
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if a token id of these parameters is outside the model's vocabulary."""
        for key, ids in (("logit_bias", self.logit_bias or ()), ("allowed_token_ids", self.allowed_token_ids or ()), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if token >= vocab_size:
                    raise ValueError(f"{key}: token id {token} is outside the vocabulary; ids are from 0 to {vocab_size - 1}")


def _temperature(value: Any) -> float:
    accepted = "0 (greedy), or a number from 1e-4 to 1e4"
    value = number("temperature", value, 0.0, 1e4, accepted)
    if 0.0 < value < 1e-4:
        raise refuse("temperature", value, accepted)
    return value


def _token_ids(key: str, value: Any, empty: bool) -> tuple[int, ...]:
    """Distinct ids, ascending."""
    if not isinstance(value, (list, tuple, set, frozenset, range)) or (not value and not empty):
        raise refuse(key, value, "None or a " + ("" if empty else "non-empty ") + "list of token ids")
    return tuple(sorted({integer(f"{key}: token id", token, 0, 2**31 - 1) for token in value}))


def _logit_bias(value: Any) -> FrozenDict | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise refuse("logit_bias", value, "None or a dict {token id: number}")
    accepted = "a number from -1e4 to 1e4 (allowed_token_ids forbids tokens)"
    return FrozenDict((integer("logit_bias: token id", token, 0, 2**31 - 1), number(f"logit_bias[{token!r}]", bias, -1e4, 1e4, accepted)) for token, bias in value.items())


def _stop(value: Any) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or any(not isinstance(s, str) or not s for s in strings):
        raise refuse("stop", value, "None, a non-empty string or a list of them")
    return tuple(dict.fromkeys(strings))


def _speculative(value: Any) -> bool | FrozenDict | None:
    if value is None or value is False:
        return value
    if not isinstance(value, dict) or not value:
        raise refuse("speculative", value, "None (as the engine is configured), False (off) or a dict of " + ", ".join(SPECULATIVE_KEYS))
    known_keys("speculative", value, SPECULATIVE_KEYS)
    checked = dict(value)
    if not isinstance(value.get("method", ""), str):
        raise refuse("speculative['method']", value["method"], "the name of a method")
    for key in SPECULATIVE_KEYS[1:]:
        if key in value:
            checked[key] = integer(f"speculative[{key!r}]", value[key], 2 if key == "num_draft_tokens" else 1, 64 if key == "num_draft_tokens" else 63)
    if "num_speculative_tokens" in value and any(key in value for key in SPECULATIVE_KEYS[2:]):
        raise ValueError("speculative: num_speculative_tokens (a chain's length) and the tree keys num_steps, eagle_topk, num_draft_tokens exclude each other")
    return FrozenDict(checked)
