"""The measure of a head: its acceptance length in the real decode loop."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from specrt import LLM, SamplingParams
from specrt.train.samples import Sample
from specrt.train.settings import Settings

_BATCH = 8


@dataclass(frozen=True)
class Acceptance:
    """length: tokens a round, mean over all rounds; by_position: share of the drafts at each depth that was accepted."""

    length: float
    by_position: list[float]


def measure(head: Path, s: Settings, held_out: list[Sample], device: str, max_positions: int) -> Acceptance:
    """Greedy answers to the held-out prompts, drafted by the head in ``head``."""
    longest = min(max(x.prompt for x in held_out) + s.eval_tokens, max_positions)
    config = {"method": s.family, "model": str(head), "num_speculative_tokens": s.draft_tokens}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the head's vocabulary and config, which are what they were made to be
        llm = LLM(s.model, device=device, dtype=s.dtype, max_batch_size=_BATCH, max_model_len=longest, speculative_config=config)
    with llm:
        outputs = llm.generate([x.prompt_ids for x in held_out], SamplingParams(max_tokens=s.eval_tokens))
    failed = [o.error for o in outputs if o.finish_reason == "error"]
    if failed:
        raise RuntimeError(f"measuring the head failed: {failed[0]}")
    stats = [o.stats for o in outputs]
    rounds, accepted = sum(x.num_rounds for x in stats), sum(x.num_accepted_tokens for x in stats)
    columns = [[sum(counts[i] for counts in lists if i < len(counts)) for i in range(s.draft_tokens)]
               for lists in ([x.num_draft_tokens_per_pos for x in stats], [x.num_accepted_tokens_per_pos for x in stats])]
    return Acceptance(1 + accepted / max(rounds, 1), [a / d if d else 0.0 for d, a in zip(*columns)])
