"""A request's statistics as plain data (for JSON) and as a line for people."""

from __future__ import annotations

from typing import Any

FIELDS = ("num_rounds", "num_draft_tokens", "num_accepted_tokens", "acceptance_length", "draft_acceptance_rate", "num_draft_tokens_per_pos",
          "num_accepted_tokens_per_pos", "time_to_first_token", "decode_time")


def as_dict(stats: Any) -> dict[str, Any]:
    values = {name: getattr(stats, name) for name in FIELDS}
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in values.items()}


def output_dict(output: Any) -> dict[str, Any]:
    keys = ("text", "token_ids", "prompt_token_ids", "finish_reason", "error", "seed", "logprobs")
    return {**{key: getattr(output, key) for key in keys}, "stats": as_dict(output.stats)}


def line(tokens: int, seconds: float, rounds: int, accepted: int) -> str:
    """``accepted`` drafts in ``rounds`` rounds: the acceptance length is the tokens a round emits on average."""
    length = 1 + accepted / rounds if rounds else 1.0
    return f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s, acceptance length {length:.2f}"
