"""MEDUSA (drafters.md 6): every level of a slot's tree has the same candidates whatever stands above, from one head each; a tree is their product, best first."""

from __future__ import annotations

import torch
from torch import Tensor

from specrt import ops
from specrt.draft.base import Drafter
from specrt.draft.expansion import Expansion
from specrt.layers.batch import RowBatch, row_bucket
from specrt.models.medusa import MedusaModel
from specrt.round.state import RoundState


class MedusaDrafter(Drafter):
    """boundary: the target's last; levels, beam_width, topk, noise, keep_logits, choices: as DraftModelDrafter's. ``root_state`` [B + 1, H]: the target's final-normed state at each
    slot's last committed token; the last row is a bin. A request of one token has none before its first round, which is one without drafts."""

    def __init__(self, model: MedusaModel, boundary: int, levels: int, beam_width: int, topk: int, noise: int, keep_logits: bool,
                 choices: tuple[tuple[int, ...], ...] | None = None):
        self.model, self.features = model, (boundary,)
        self.levels, self.beam_width, self.topk, self.noise, self.keep_logits, self.choices = levels, beam_width, topk, noise, keep_logits, choices

    def bind(self, state: RoundState, pages: int, page_size: int, prefill_rows: int) -> None:
        super().bind(state, pages, page_size, prefill_rows)
        m, device = self.model, state.device
        self.expansion = Expansion(state, page_size, m.vocab, m.target_ids, self.levels, self.beam_width, self.topk, self.noise, self.keep_logits,
                                   ops.attention_workspace(0, 1, 1, 1, device), choices=self.choices, of_head=True)
        self.root_state = torch.zeros(state.batch + 1, m.hidden_size, dtype=m.dtype, device=device)
        self.slot_logits = torch.empty(state.batch, m.vocab, dtype=torch.float32, device=device)

    def prefill(self, batch: RowBatch, end: Tensor, features: dict[int, Tensor]) -> None:
        request = batch.request.long()
        index = torch.arange(batch.rows, dtype=torch.int32, device=self.state.device)
        last = (index < batch.num_rows) & (batch.position + 1 == end[request])
        state = self.model.state(features[self.features[0]], batch.num_rows)
        self.root_state.index_copy_(0, torch.where(last, request, self.state.batch), state)

    def extend(self, features: dict[int, Tensor], slots: int, depth: int) -> None:
        s, grow = self.state, self.expansion
        node = s.path.gather(1, (s.path_len - 1).clamp_min(0).long()[:, None])[:, 0]
        row = (s.row_offset[:-1] + node).clamp(0, s.rows - 1).long()
        state = self.model.state(features[self.features[0]].index_select(0, row), grow.num_slots)
        mine = (self.max_nodes > 0) & (s.path_len > 0)
        self.root_state.index_copy_(0, torch.where(mine, grow.slots, s.batch).long(), state)

    def propose(self, slots: int, depth: int) -> None:
        s, grow = self.state, self.expansion
        nodes, depths = grow.limits(self.max_nodes, self.max_depth)
        beam = grow.batch.head(row_bucket(slots * self.beam_width, grow.batch.rows))
        self._logits(0, grow.logits[: s.batch])
        grow.first(depths)
        for level in range(2, depth + 1):
            self._logits(level - 1, self.slot_logits)
            grow.level(level, beam.rows, depths, (self.slot_logits, 1, 0))
        grow.select(nodes, depths, depth)

    def _logits(self, j: int, out: Tensor) -> None:
        self.model.logits(j, self.root_state[: self.state.batch], self.expansion.num_slots, out)

    def draft_logits(self) -> tuple[Tensor, Tensor] | None:
        return self.expansion.draft_logits(self.max_depth)
