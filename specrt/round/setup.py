"""SlotSetup: what the engine says about a request that enters a slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class SlotSetup:
    tokens: list[int]  # prompt + tokens generated before (a request that was put back); the last is the root of the first round
    prompt_len: int
    seed: int  # signed 64-bit
    params: Any  # SamplingParams
    stop_ids: tuple[int, ...]  # suppressed while the output index is below min_tokens; at most state.STOP_IDS
    method: str | None  # the drafter, None = no speculation
    num_speculative_tokens: int  # most draft nodes
    max_depth: int
    longest: int  # most tokens that prompt and output may have together; the slot stops there by itself
