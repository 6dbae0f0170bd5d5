"""A request's statistics as plain data (for JSON), and a stream's as a line for people."""

from __future__ import annotations

import time
from typing import Any

FIELDS = ("num_rounds", "num_draft_tokens", "num_accepted_tokens", "acceptance_length", "draft_acceptance_rate", "num_draft_tokens_per_pos",
          "num_accepted_tokens_per_pos", "time_to_first_token", "decode_time")


def as_dict(stats: Any) -> dict[str, Any]:
    values = {name: getattr(stats, name) for name in FIELDS}
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in values.items()}


def output_dict(output: Any) -> dict[str, Any]:
    keys = ("text", "token_ids", "prompt_token_ids", "finish_reason", "error", "seed", "logprobs")
    return {**{key: getattr(output, key) for key in keys}, "stats": as_dict(output.stats)}


class Tally:
    """Counts the pieces of a stream as they come. A piece is a round; the rate is of the tokens after the first piece, which the prompt's prefill comes before."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.rounds = self.accepted = self.first_tokens = 0
        self.first_seconds = self.seconds = 0.0
        self._start = time.perf_counter()

    def add(self, piece: Any) -> None:
        self.seconds = time.perf_counter() - self._start
        self.token_ids += piece.token_ids
        self.rounds += bool(piece.token_ids)
        self.accepted += sum(piece.drafted)
        if not self.first_tokens:
            self.first_seconds, self.first_tokens = self.seconds, len(self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        return (len(self.token_ids) - self.first_tokens) / max(self.seconds - self.first_seconds, 1e-9)

    @property
    def acceptance_length(self) -> float:
        return 1 + self.accepted / self.rounds if self.rounds else 1.0

    def __str__(self) -> str:
        return (f"{len(self.token_ids)} tokens in {self.seconds:.2f} s ({self.first_seconds:.2f} s to the first), then {self.tokens_per_s:.1f} tokens/s, "
                f"acceptance length {self.acceptance_length:.2f}")
