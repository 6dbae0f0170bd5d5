"""Expansion: the level-by-level growth of a token tree by a drafter with a network (EAGLE-2's beam, drafters.md 2).

W beam rows a slot and level, k children a row. W = k is EAGLE-2's dynamic tree (re-ranked at the end), W = k = 1 a chain, W = 1 < k a caterpillar: only
the first child is expanded, nothing is re-ranked, so that rejection sampling without replacement stays unbiased (verification.md 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from specrt import ops
from specrt.draft.vocabulary import over_target
from specrt.layers.batch import RowBatch
from specrt.round.state import RoundState


class Expansion:
    """Buffers and steps of one drafter's expansion. Rows: packed, at most B * W a level. Use: ``first`` on the roots' logits, then for every further level run
    the network on ``batch`` and call ``level``; ``select`` ends it.

    vocab, ids: the columns of ``logits``, which are the drafter's own, and the target's token of each (int64, ascending; None: 0, 1, ...).

    lag: how far the network's position stands behind its token's. 0: a language model. 1: a head that takes a token with the feature of the token before it, at that
    one's position (drafters.md 0.1): its keys of the committed tokens are one fewer, and the scratch begins one slot earlier.

    choices: a static tree, sorted paths of ranks. Its nodes get scores by their place alone (``_static_scores``), so that the beam is those that have children, and the
    best candidates at the end are the tree.

    of_head: the drafter reads the target's features (``ops.draft_children``)."""

    def __init__(self, state: RoundState, page_size: int, vocab: int, ids: Tensor | None, levels: int, beam_width: int, topk: int, noise: int, keep_logits: bool,
                 workspace: ops.AttentionWorkspace, lag: int = 0, choices: tuple[tuple[int, ...], ...] | None = None, of_head: bool = False):
        self.lag, self.ids, self.of_head = lag, ids, of_head
        self.state, self.page_size, self.levels, self.beam_width, self.topk, self.noise = state, page_size, levels, beam_width, topk, noise
        batch, device = state.batch, state.device
        rows = batch * beam_width
        i32 = dict(dtype=torch.int32, device=device)
        candidates = topk + (levels - 1) * beam_width * topk
        self.cand_token = torch.zeros(batch, candidates, **i32)
        self.cand_parent = torch.zeros(batch, candidates, **i32)
        self.cand_score = torch.zeros(batch, candidates, dtype=torch.float32, device=device)
        self.beam = torch.zeros(batch, beam_width, **i32)
        self.topk_token = torch.zeros(rows, topk, **i32)
        # A chain's nodes are all taken: nobody ranks them.
        ranked = topk > 1 or keep_logits or choices is not None
        self.topk_score = torch.zeros(rows, topk, dtype=torch.float32, device=device) if ranked else None
        self.logits = torch.empty(rows, vocab, dtype=torch.float32, device=device)
        self.slots = torch.arange(batch, **i32)
        self.row_index = torch.arange(rows, **i32)
        self.num_slots = torch.full((1,), batch, **i32)
        self.batch = RowBatch(token=torch.zeros(rows, **i32), position=torch.zeros(rows, **i32), request=torch.zeros(rows, **i32), prefix=torch.zeros(rows, **i32),
                              slot=torch.zeros(rows, dtype=torch.int64, device=device), num_rows=torch.zeros(1, **i32), block_table=state.block_table,
                              workspace=workspace, paths=torch.full((rows, max(levels, 1)), -1, **i32))
        #: int32 [rows]: for a row of ``batch`` its parent's: of the roots' (the slot) at level 2, of ``batch`` as it was before later.
        self.parent = torch.zeros(rows, **i32)
        self.base = torch.zeros_like(state.seq_lens) if lag else state.seq_lens  # seq_lens - lag, by ``limits``
        self.nodes, self.depths = torch.zeros_like(state.seq_lens), torch.zeros_like(state.seq_lens)
        self.static = None if choices is None else [t.repeat(batch, 1).to(device) for t in _static_scores(choices, levels, beam_width, topk)]
        self.kept = None
        if keep_logits:  # of the target's tokens; row B is a bin for rows that are not in use
            self.kept = torch.empty(batch + 1, levels, state.vocab, dtype=torch.float32, device=device)
            self.spread, self.perturbed = (torch.empty(rows, state.vocab, dtype=torch.float32, device=device) for _ in range(2))
            self.status, self.sampling_i = torch.zeros(rows, **i32), torch.zeros_like(state.sampling_i)

    def limits(self, max_nodes: Tensor, max_depth: Tensor) -> tuple[Tensor, Tensor]:
        """(nodes, depths) of a drafter that grows its trees from what is committed: 0 for slots that have no tree to grow. With a lag, to be called first."""
        s = self.state
        ops.draft_limits(max_nodes, max_depth, s.seq_lens, s.active, self.lag, self.nodes, self.depths, self.base if self.lag else None)
        return self.nodes, self.depths

    def first(self, max_depth: Tensor, of_slots: tuple[Tensor, int, int] | None = None) -> None:
        """Children of the roots, from self.logits[:B] (row b = slot b); of_slots: as in ``level``."""
        s, n = self.state, self.state.batch
        self._children(1, n, self.slots, s.seq_lens, 1, self.num_slots, of_slots)
        self._grow(1, n, max_depth)

    def level(self, level: int, rows: int, max_depth: Tensor, of_slots: tuple[Tensor, int, int] | None = None) -> None:
        """Children of the beam, from self.logits[:rows] (rows of ``batch``); ``level``: their depth, from 2 on. of_slots (logits [B m, D], m, i): from the i-th of the slot's m rows."""
        b = self.batch.head(rows)
        self._children(level, rows, b.request, b.position, 1 + self.lag, b.num_rows, of_slots)
        self._grow(level, rows, max_depth)

    def select(self, max_nodes: Tensor, max_depth: Tensor, levels: int) -> None:
        s = self.state
        ops.tree_select(levels, self.beam_width, self.topk, max_nodes, max_depth, self.cand_token, self.cand_parent, self.cand_score, s.tree_token, s.tree_parent,
                        s.tree_size)

    def draft_logits(self, max_depth: Tensor) -> tuple[Tensor, Tensor] | None:
        """Drafter.draft_logits."""
        return None if self.kept is None else (self.kept[: self.state.batch], max_depth)

    def _children(self, level: int, rows: int, request: Tensor, position: Tensor, ahead: int, num_rows: Tensor, of_slots: tuple[Tensor, int, int] | None) -> None:
        """The best children of each row, which stand at position + ahead. Without penalties: they change acceptance little and would need per-node counts of the beam."""
        s, (token, score) = self.state, self._best(rows)
        own, slot_rows, which = of_slots or (self.logits[:rows], 0, 0)
        if self.kept is None:
            ops.draft_children(own, slot_rows, which, self.ids, request, position, ahead, s.sampling_f, s.sampling_i, s.stop_ids, s.bias, s.seeds, self.noise, self.of_head, num_rows, token,
                               score)
            return
        z, before = self.spread[:rows], position + (ahead - 1)
        over_target(own.index_select(0, request * slot_rows + which) if slot_rows else own, self.ids, z)
        self.sampling_i.copy_(s.sampling_i)
        self.sampling_i[:, ops.HAS_PENALTY] = 0
        ops.sample_transform(z, request, before, None, None, None, s.sampling_f, self.sampling_i, s.stop_ids, s.bias, s.output_count, s.prompt_mask, None, None, num_rows,
                             self.status[:rows])
        ops.draft_topk(z, request, before, s.seeds, s.sampling_f, self.noise, num_rows, self.perturbed[:rows], token, score)
        bins = torch.where(self.row_index[:rows] < num_rows, request, s.batch).long()
        self.kept[:, level - 1].index_copy_(0, bins, z)

    def _best(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """(tokens, scores) of the children of so many rows."""
        return self.topk_token[:rows], None if self.topk_score is None else self.topk_score[:rows]

    def _grow(self, level: int, rows: int, max_depth: Tensor) -> None:
        s, b, (token, score) = self.state, self.batch, self._best(rows)
        if self.static is not None:
            score = torch.where(torch.isneginf(score), score, self.static[level - 1][: score.shape[0]])  # a token that is missing stays so
        ops.tree_expand(level, self.beam_width, token, score, max_depth, self.base, s.block_table, self.page_size, self.cand_token, self.cand_parent, self.cand_score,
                        self.beam, b.request, b.token, b.position, b.prefix, b.slot, b.paths, self.parent, b.num_rows)


def _static_scores(choices: tuple[tuple[int, ...], ...], levels: int, beam_width: int, topk: int) -> list[Tensor]:
    """For each level float32 [1 (level 1) or W, k]: what a child adds to its parent's score, by the parent's place in the beam and the child's rank: 0 for a node that has children,
    -1 for a leaf, -inf for what is not in the tree. Ties go to the lower index, so the beam holds the nodes with children in the order of their paths."""
    parents = {path[:-1] for path in choices}
    tables, beam = [], [()]
    for level in range(1, levels + 1):
        table = torch.full((1 if level == 1 else beam_width, topk), float("-inf"))
        for path in choices:
            if len(path) == level:
                table[beam.index(path[:-1]), path[-1]] = 0.0 if path in parents else -1.0
        tables.append(table)
        beam = [path for path in choices if len(path) == level and path in parents]
    return tables
