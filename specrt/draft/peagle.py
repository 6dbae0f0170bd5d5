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
    """``root_hidden`` [B * levels, h]: the outputs of each slot's last true row and of the mask rows behind it, level by level. As with MEDUSA, a level's candidates are the same
    whatever stands above. A mask row's keys lie where the next ``extend`` writes."""

    model: PEagleModel

    def __init__(self, model: PEagleModel, boundaries: tuple[int, ...], mask_token: int, **growth: Any):
        super().__init__(model, boundaries, **growth)
        self.mask_token, self.root_rows = mask_token, self.levels
        self.scratch_slots = self._rows_a_slot(self.levels)  # from the committed length before the round on

    def _rows_a_slot(self, depth: int) -> int:
        return 1 + depth + depth - 1

    def bind(self, state: RoundState, pages: int, page_size: int, prefill_rows: int) -> None:
        super().bind(state, pages, page_size, prefill_rows)
        rows = state.batch * self.levels
        self.used_rows, self.root_feature = self.max_depth, None  # no level takes the feature of another
        self.root_logits = torch.empty(rows, self.model.vocab, dtype=torch.float32, device=state.device)
        self.all_rows = torch.full((1,), rows, dtype=torch.int32, device=state.device)
        self.mask_tokens = torch.full_like(self.span.token, self.mask_token)

    def prefill(self, batch: RowBatch, end: Tensor, features: dict[int, Tensor]) -> None:
        super().prefill(batch, end, features)
        sp = self.span
        sp.start.copy_(end)
        torch.add(end, (self.max_depth - 1).clamp_min(0) * (end > 0), out=sp.end)
        ops.span_rows(self.state.history, sp.start, sp.end, self.state.block_table, self.page_size, sp.row_offset, sp.request, sp.token, sp.position, sp.prefix, sp.slot, sp.num_rows)
        masks = self.span_batch.with_tokens(self.mask_tokens)
        self._keep(masks, self.model.mask_feature.repeat(masks.rows, 1), end)

    def propose(self, slots: int, depth: int) -> None:
        grow = self.expansion
        nodes, depths = grow.limits(self.max_nodes, self.max_depth)
        beam = grow.batch.head(row_bucket(slots * self.beam_width, grow.batch.rows))
        self.model.logits(self.root_hidden, self.all_rows, self.root_logits)
        grow.first(depths, (self.root_logits, self.levels, 0))
        for level in range(2, depth + 1):
            grow.level(level, beam.rows, depths, (self.root_logits, self.levels, level - 1))
        grow.select(nodes, depths, depth)
