"""Speculation off against on, on the same prompts in the same process: repeated, alternating, outputs compared."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Callable

from specrt.cli.prompts import Prompt


class RunFailed(Exception):
    """A request ended with an error, or was not reproducible: there is nothing to measure."""


@dataclass
class Timed:
    """One prompt, one mode, all repeats. Seconds are the median's; spread is (slowest - fastest) / median."""

    token_ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # whole requests
    decode_seconds: list[float] = field(default_factory=list)  # after the first token
    stats: Any = None

    def add(self, output: Any, seconds: float) -> None:
        if output.finish_reason == "error":
            raise RunFailed(f"a request failed: {output.error}")
        if self.seconds and output.token_ids != self.token_ids:
            raise RunFailed("the same request gave two different outputs in one mode")
        self.token_ids, self.stats = list(output.token_ids), output.stats
        self.seconds.append(seconds)
        self.decode_seconds.append(output.stats.decode_time or 0.0)  # None: there is no second token


@dataclass
class Comparison:
    prompt: Prompt
    off: Timed
    on: Timed

    @property
    def identical(self) -> bool:
        return self.off.token_ids == self.on.token_ids


def time_once(llm: Any, prompt: Prompt, params: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    (output,) = llm.generate([prompt.messages], params, chat=True)
    return output, time.perf_counter() - start


def compare(llm: Any, prompts: list[Prompt], off: Any, on: Any, repeats: int, step: Callable[[], None] = lambda: None) -> list[Comparison]:
    """Every prompt alone, ``repeats`` times in each mode (``off``, ``on``: SamplingParams), in alternation so that a slow minute hits both.
    ``step`` is called after every request. A first, untimed request warms up."""
    time_once(llm, prompts[0], on)
    results = [Comparison(prompt, Timed(), Timed()) for prompt in prompts]
    for _ in range(repeats):
        for result in results:
            for mode, params in ((result.off, off), (result.on, on)):
                mode.add(*time_once(llm, result.prompt, params))
                step()
    return results


@dataclass(frozen=True)
class Rate:
    """Tokens a second of a group of requests: median over the repeats, and spread = (best - worst) / median."""

    value: float
    spread: float


def rate(timings: list[Timed], decode: bool = True) -> Rate:
    """With ``decode``, of the tokens after each request's first one; otherwise of whole requests, prefill included."""
    tokens = sum(len(t.token_ids) - decode for t in timings)
    seconds = [sum(t.decode_seconds[i] if decode else t.seconds[i] for t in timings) for i in range(len(timings[0].seconds))]
    rates = [tokens / max(s, 1e-9) for s in seconds]
    middle = median(rates)
    return Rate(middle, (max(rates) - min(rates)) / middle if middle else 0.0)


def acceptance(stats: list[Any]) -> dict[str, Any]:
    """Totals over requests. acceptance_per_pos: accepted / drafted at each draft depth; accepted_per_round_per_pos: the share of the rounds whose output reached
    that depth, so that they add up to acceptance_length - 1, for chains and trees alike."""
    counts = ("num_rounds", "num_drafts", "num_draft_tokens", "num_accepted_tokens")
    rounds, drafts, drafted, accepted = (sum(getattr(s, name) for s in stats) for name in counts)
    depth = max((len(s.num_draft_tokens_per_pos) for s in stats), default=0)
    at = lambda values, i: values[i] if i < len(values) else 0  # noqa: E731
    drafted_per_pos = [sum(at(s.num_draft_tokens_per_pos, i) for s in stats) for i in range(depth)]
    accepted_per_pos = [sum(at(s.num_accepted_tokens_per_pos, i) for s in stats) for i in range(depth)]
    return {
        "num_rounds": rounds, "num_drafts": drafts, "num_draft_tokens": drafted, "num_accepted_tokens": accepted,
        "acceptance_length": 1 + accepted / rounds if rounds else 1.0, "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "num_draft_tokens_per_pos": drafted_per_pos, "num_accepted_tokens_per_pos": accepted_per_pos,
        "acceptance_per_pos": [a / d if d else 0.0 for a, d in zip(accepted_per_pos, drafted_per_pos)],
        "accepted_per_round_per_pos": [a / rounds for a in accepted_per_pos],
    }
