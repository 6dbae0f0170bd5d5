"""P-EAGLE (drafters.md 5): one pass gives all drafts. Behind a slot's last true row stand rows of a mask token with a learned feature, each seeing those before it.

The pass that takes in what a round has committed has the mask rows of the next round too, so that ``propose`` runs no layer at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specrt import ops
from specrt.draft.head import HeadDrafter
from specrt.layers.batch import RowBatch, row_bucket
from specrt.models.head import PEagleModel
from specrt.round.state import RoundState


class PEagleDrafter(HeadDrafter):
    """``hidden`` [B * levels + 1, h]: the outputs of each slot's last true row and of the mask rows behind it, level by level; the last row is a bin. As with MEDUSA, a level's
    candidates are the same whatever stands above. A mask row's keys lie where the next ``extend`` writes."""

    model: PEagleModel

    def __init__(self, model: PEagleModel, boundaries: tuple[int, ...], mask_token: int, **growth: Any):
        super().__init__(model, boundaries, **growth)
        self.mask_token = mask_token
        self.scratch_slots = self._rows_a_slot(self.levels)  # from the committed length before the round on

    def _rows_a_slot(self, depth: int) -> int:
        return 1 + depth + depth - 1

    def bind(self, state: RoundState, pages: int, page_size: int, prefill_rows: int) -> None:
        super().bind(state, pages, page_size, prefill_rows)
        rows, m = state.batch * self.levels, self.model
        self.hidden = torch.zeros(rows + 1, m.hidden_size, dtype=m.dtype, device=state.device)
        self.own_logits = torch.empty(rows, m.vocab, dtype=torch.float32, device=state.device)
        self.all_rows = torch.full((1,), rows, dtype=torch.int32, device=state.device)
        self.mask_tokens = torch.full_like(self.span.token, self.mask_token)

    def prefill(self, batch: RowBatch, end: Tensor, features: dict[int, Tensor]) -> None:
        super().prefill(batch, end, features)
        sp = self.span
        sp.start.copy_(end)
        torch.add(end, (self.max_depth - 1).clamp_min(0) * (end > 0), out=sp.end)
        masks = self._place(sp.rows).with_tokens(self.mask_tokens)
        self._keep(masks, *self.model.forward(masks, self.model.mask_feature.repeat(masks.rows, 1), self.pool), end)

    def extend(self, features: dict[int, Tensor], slots: int, depth: int) -> None:
        s, sp, m = self.state, self.span, self.model
        torch.sub(s.seq_lens, s.path_len, out=sp.start)
        torch.mul(s.seq_lens + self.max_depth - 1, (self.max_nodes > 0) & (s.path_len > 0), out=sp.end)
        batch = self._place(row_bucket(slots * self._rows_a_slot(depth), sp.rows))
        request = batch.request.long()
        masked = batch.position >= s.seq_lens[request]
        feature = torch.where(masked[:, None], m.mask_feature, m.combine(self._rows_of(features, batch), batch.num_rows))
        token = torch.where(masked, self.mask_tokens[: batch.rows], s.history[request, (batch.position + 1).long()])
        self._keep(batch, *m.forward(batch.with_tokens(token), feature, self.pool), s.seq_lens)

    def _place(self, rows: int) -> RowBatch:
        """The rows of the span from ``span.start`` to ``span.end``, at most ``rows`` of them."""
        s, sp = self.state, self.span
        ops.span_rows(s.history, sp.start, sp.end, s.block_table, self.page_size, sp.row_offset, sp.request, sp.token, sp.position, sp.prefix, sp.slot, sp.num_rows)
        return self.span_batch.head(rows)

    def _rows_of(self, features: dict[int, Tensor], batch: RowBatch) -> list[Tensor]:
        """The features of the round's accepted path at the batch's positions; of any row at all where a position is not on the path, or a row not in use."""
        s, request = self.state, batch.request.long()
        nth = (batch.position - self.span.start[request]).clamp(0, s.nodes - 1).long()
        row = (s.row_offset[request] + s.path[request, nth]).clamp(0, s.rows - 1)
        return [features[j].index_select(0, row) for j in self.features]

    def _keep(self, batch: RowBatch, hidden: Tensor, feature: Tensor, end: Tensor) -> None:
        request = batch.request.long()
        level = batch.position + 1 - end[request]
        place = torch.where(self._in_use(batch) & (level >= 0), request * self.levels + level, self.hidden.shape[0] - 1)
        self.hidden.index_copy_(0, place, hidden)

    def propose(self, slots: int, depth: int) -> None:
        grow = self.expansion
        nodes, depths = grow.limits(self.max_nodes, self.max_depth)
        beam = grow.batch.head(row_bucket(slots * self.beam_width, grow.batch.rows))
        self.model.logits(self.hidden[:-1], self.all_rows, self.own_logits)
        grow.logits[: self.state.batch].copy_(self.own_logits[:: self.levels])
        grow.first(depths)
        for level in range(2, depth + 1):
            row = beam.request.long() * self.levels + level - 1
            torch.index_select(self.own_logits, 0, row, out=grow.logits[: beam.rows])
            grow.level(level, beam.rows, depths)
        grow.select(nodes, depths, depth)
