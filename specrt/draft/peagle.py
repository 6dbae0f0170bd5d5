"""P-EAGLE (drafters.md 5): one pass gives all drafts. Behind a slot's last true row stand rows of a mask token with a learned feature, each seeing those before it."""

from __future__ import annotations

from typing import Any

import torch

from specrt import ops
from specrt.draft.head import HeadDrafter
from specrt.draft.vocabulary import over_target
from specrt.layers.batch import RowBatch, row_bucket
from specrt.models.head import PEagleModel
from specrt.round.state import RoundState, SpanRows


class PEagleDrafter(HeadDrafter):
    """The rows' keys lie in the scratch slots behind the committed ones, where the next ``extend`` writes. As with MEDUSA, a level's candidates are the same whatever stands above."""

    model: PEagleModel

    def __init__(self, model: PEagleModel, boundaries: tuple[int, ...], mask_token: int, **growth: Any):
        super().__init__(model, boundaries, **growth)
        self.mask_token, self.scratch_slots = mask_token, self.levels - 1

    def bind(self, state: RoundState, pages: int, page_size: int, prefill_rows: int) -> None:
        super().bind(state, pages, page_size, prefill_rows)
        rows = max(state.batch * (min(self.levels, state.nodes - 1) - 1), 1)
        sp = self.masks = SpanRows(state.batch, rows, state.device)
        self.mask_batch = RowBatch(token=torch.full_like(sp.token, self.mask_token), position=sp.position, request=sp.request, prefix=sp.prefix, slot=sp.slot, num_rows=sp.num_rows,
                                   block_table=state.block_table, workspace=self.span_batch.workspace)
        self.mask_logits = torch.empty(rows, self.model.vocab, dtype=torch.float32, device=state.device)

    def propose(self, slots: int, depth: int) -> None:
        s, sp, grow, m = self.state, self.masks, self.expansion, self.model
        mine = self._mine()
        depths = self.max_depth * mine
        beam = grow.batch.head(row_bucket(slots * self.beam_width, grow.batch.rows))
        self._logits(self.root_hidden[: s.batch], grow.num_slots)
        grow.first(depths)
        masks = self.mask_batch.head(row_bucket(slots * (depth - 1), sp.rows))
        logits = self.mask_logits[: masks.rows]
        if depth > 1:
            sp.start.copy_(s.seq_lens)
            torch.add(s.seq_lens, (depths - 1).clamp_min(0), out=sp.end)
            ops.span_rows(s.history, sp.start, sp.end, s.block_table, self.page_size, sp.row_offset, sp.request, sp.token, sp.position, sp.prefix, sp.slot, sp.num_rows)
            hidden, _ = m.forward(masks, m.mask_feature.repeat(masks.rows, 1), self.pool)
            m.logits(hidden, masks.num_rows, logits)
        for level in range(2, depth + 1):
            row = (sp.row_offset[beam.request.long()] + level - 2).clamp(0, masks.rows - 1)
            over_target(logits.index_select(0, row), m.target_ids, grow.logits[: beam.rows])
            grow.level(level, beam.rows, depths)
        grow.select(self.max_nodes * mine, depths, depth)
