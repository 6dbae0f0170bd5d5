"""What speculation did: per request, and in total under the metric names (design: measured, not promised)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SpeculationCounts:
    """Counts of rounds. *_per_pos: index 0 = depth 1, the root's children."""

    num_rounds: int = 0
    num_drafts: int = 0  # rounds that had at least one draft token
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # drafts that reached the output: those behind a stop are not counted
    num_draft_tokens_per_pos: list[int] = field(default_factory=list)
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    def add_round(self, draft_depths: list[int], accepted: int) -> None:
        """draft_depths: depth of each drafted node; accepted: how many drafts of the path reached the output (depths 1 .. accepted)."""
        self.num_rounds += 1
        self.num_drafts += bool(draft_depths)
        self.num_draft_tokens += len(draft_depths)
        self.num_accepted_tokens += accepted
        deepest = max(draft_depths, default=0)
        for per_pos in (self.num_draft_tokens_per_pos, self.num_accepted_tokens_per_pos):
            per_pos.extend([0] * (deepest - len(per_pos)))
        for depth in draft_depths:
            self.num_draft_tokens_per_pos[depth - 1] += 1
        for depth in range(accepted):
            self.num_accepted_tokens_per_pos[depth] += 1

    @property
    def acceptance_length(self) -> float:
        """Accepted drafts + 1, mean over rounds; 0.0 before the first round."""
        return (self.num_accepted_tokens + self.num_rounds) / self.num_rounds if self.num_rounds else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted / drafted; 0.0 where nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0


@dataclass
class RequestStats(SpeculationCounts):
    """Statistics of one request. Times in seconds: time_to_first_token from its arrival (waiting and prompt included), decode_time from the first to the
    last token. method: the drafter, None = no speculation. synthetic: acceptance was made up (benchmarks); lossy: the output's law is not the target's."""

    method: str | None = None
    rejection_sample_method: str = "exact"
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0  # times the request was put back for want of pages, and recomputed
    time_to_first_token: float | None = None
    decode_time: float | None = None

    @property
    def synthetic(self) -> bool:
        return self.rejection_sample_method == "synthetic"

    @property
    def lossy(self) -> bool:
        return self.rejection_sample_method not in ("exact", "standard")


class EngineTotals(SpeculationCounts):
    """Totals of an engine since it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt_tokens = self.generation_tokens = self.preemptions = 0
        self.finished = {"stop": 0, "length": 0, "error": 0, "abort": 0}

    def metrics(self) -> dict[str, int | dict[int, int] | dict[str, int]]:
        """Counter name -> value; a counter with a label is a dict {label: value} (position: 0 = depth 1)."""
        return {
            "specrt:spec_decode_num_rounds_total": self.num_rounds,
            "specrt:spec_decode_num_drafts_total": self.num_drafts,
            "specrt:spec_decode_num_draft_tokens_total": self.num_draft_tokens,
            "specrt:spec_decode_num_accepted_tokens_total": self.num_accepted_tokens,
            "specrt:spec_decode_num_draft_tokens_per_pos_total": dict(enumerate(self.num_draft_tokens_per_pos)),
            "specrt:spec_decode_num_accepted_tokens_per_pos_total": dict(enumerate(self.num_accepted_tokens_per_pos)),
            "specrt:prompt_tokens_total": self.prompt_tokens,
            "specrt:generation_tokens_total": self.generation_tokens,
            "specrt:num_preemptions_total": self.preemptions,
            "specrt:request_finished_total": dict(self.finished),
        }
