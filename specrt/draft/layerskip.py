"""LayerSkip self-speculation (drafters.md 11): the target's own first layers draft, through its final norm and lm_head.

The keys and values of those layers are the target's: the same kernels on the same rows, so what the target has committed is, to the bit, what the drafter would have written.
Its own pages would only hold a copy, so it has none: it reads the committed slots of the target's pool and needs no prompt pass and no ``extend``. Its root and the tree it grows
go to the slots behind the committed length, which nobody reads before this round's verification has written there its own rows, root first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from specrt.cache.pool import KVPool
from specrt.draft.draft_model import DraftModelDrafter
from specrt.layers.batch import RowBatch
from specrt.models.dense import DenseModel
from specrt.round.state import RoundState


class LayerSkipDrafter(DraftModelDrafter):
    """exit_layer E: boundary at which drafts leave the target, 1 to L - 1. growth: as DraftModelDrafter's."""

    def __init__(self, target: DenseModel, exit_layer: int, **growth: Any):
        super().__init__(target.first_layers(exit_layer), **growth)

    def bytes_per_page(self, page_size: int) -> int:
        return 0

    def lend(self, pool: KVPool) -> None:
        self.target_pool = pool

    def bind(self, state: RoundState, pages: int, page_size: int, prefill_rows: int) -> None:
        super().bind(state, 0, page_size, 0)
        self.pool = self.target_pool

    def _rows_a_slot(self) -> int:
        return 1  # the root: all before it is committed

    def prefill(self, batch: RowBatch, end: Tensor, features: dict[int, Tensor]) -> None:
        pass

    def propose(self, slots: int, depth: int) -> None:
        self.consumed.copy_(self.state.seq_lens)
        super().propose(slots, depth)
