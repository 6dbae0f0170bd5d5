"""N-gram / prompt lookup (vLLM's rule and keys; drafters.md 9): the tokens after an earlier occurrence of the last n tokens."""

from __future__ import annotations

from specrt import ops
from specrt.draft.base import Drafter


class NgramDrafter(Drafter):
    """min_n, max_n: prompt_lookup_min / prompt_lookup_max. branches: 1 = a chain; more = several occurrences merged into a tree."""

    def __init__(self, min_n: int, max_n: int, branches: int):
        self.min_n, self.max_n, self.branches = min_n, max_n, branches

    def propose(self, slots: int, depth: int) -> None:
        s = self.state
        ops.ngram_propose(s.history, s.seq_lens, self.max_nodes, self.max_depth, self.min_n, self.max_n, self.branches, s.seeds, s.sampling_f,
                          s.tree_token, s.tree_parent, s.tree_size)
