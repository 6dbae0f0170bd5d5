"""What callers get: whole outputs, and pieces of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from specrt.engine.statistics import RequestStats


@dataclass
class RequestOutput:
    """One answer.

    finish_reason: "stop" (end of text, a stop id or string), "length" (max_tokens or max_model_len) or "error" (then ``error`` says what; text and token ids
    are what came before). token_ids go up to the token that completed a stop; text ends before it. seed: what was used, so that the answer can be had again.
    logprobs: one {token id: log-probability} an output token, the sampled one first; prompt_logprobs: one a prompt token, None for the first.
    drafted: per output token, whether a drafter proposed it. samples: the n samples of the prompt, this one first."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    error: str | None
    seed: int
    logprobs: list[dict[int, float]] | None
    prompt_logprobs: list[dict[int, float] | None] | None
    drafted: list[bool]
    stats: RequestStats
    samples: list[RequestOutput] = field(default_factory=list, repr=False, compare=False)


@dataclass
class StreamPiece:
    """What one round added to a request. text may lag behind token_ids while a character or a possible stop string is unfinished; the pieces' texts joined are
    the output's text. drafted: one bool a token. The last piece has finish_reason and the whole ``output``."""

    text: str
    token_ids: list[int]
    drafted: list[bool]
    finish_reason: str | None = None
    error: str | None = None
    output: RequestOutput | None = None
