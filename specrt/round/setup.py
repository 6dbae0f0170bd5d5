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

    @property
    def needs_logits(self) -> bool:
        """Whether the choice of a token, or what is said of it, takes more of its row than the best score and the log-sum-exp."""
        p = self.params
        filtered = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        barred = p.logit_bias is not None or p.allowed_token_ids is not None or p.token_mask is not None or (p.min_tokens > 0 and len(self.stop_ids) > 0)
        return filtered or penalised or barred or (p.logprobs or 0) > 0
