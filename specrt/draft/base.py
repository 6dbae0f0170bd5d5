"""The one interface of every drafter family."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from specrt.cache.pool import KVPool
from specrt.layers.batch import RowBatch
from specrt.round.state import RoundState


class Drafter(ABC):
    """Fills the trees of its requests, on the device, without a host sync, and by the same launches whenever ``slots`` and ``depth`` are the same: they are
    captured in a CUDA graph. What lives from one round to another is allocated in ``bind`` and written in place; temporaries of torch's ops are fine.

    The life of a drafter: ``lend`` and ``bind`` once; then for every request ``admit``, ``prefill`` for each prompt chunk, and in every round ``propose`` (before
    verification) and ``extend`` (after it); a slot that is released is simply admitted anew. A slot belongs to one drafter at a time:
    ``max_nodes`` is 0 for the others'."""

    #: Target features wanted: residual-stream boundaries 0..L (drafters.md 0), each captured as [R, H] at every row the target runs.
    features: tuple[int, ...] = ()
    #: KV slots past the committed length that an expansion writes in the drafter's own pool.
    scratch_slots: int = 0
    #: int32 [B]: most draft nodes, and most depth, of each slot.
    max_nodes: Tensor
    max_depth: Tensor

    #: False: ``propose`` needs the host, and is never captured (the tests' drafters that know the answer).
    captured: bool = True
    #: Positions its network was made for; None = any.
    max_positions: int | None = None

    def bytes_per_page(self, page_size: int) -> int:
        """Bytes of a page in the drafter's own KV pool, 0 without one."""
        return 0

    def lend(self, pool: KVPool) -> None:
        """Before ``bind``: the target's own pool, for a drafter that reads it."""

    def bind(self, state: RoundState, pages: int, page_size: int, prefill_rows: int) -> None:
        """Allocates every buffer. ``pages``: size of a KV pool of its own; ``prefill_rows``: capacity of a prompt chunk."""
        self.state, self.page_size = state, page_size
        self.max_nodes = torch.zeros(state.batch, dtype=torch.int32, device=state.device)
        self.max_depth = torch.zeros(state.batch, dtype=torch.int32, device=state.device)

    def admit(self, slot: int, max_nodes: int, max_depth: int) -> None:
        """Host side: the slot's budget (0: the slot is another drafter's, or nobody's)."""
        self.max_nodes[slot].fill_(max_nodes)  # an assignment of a number would wait for the device
        self.max_depth[slot].fill_(max_depth)

    def prefill(self, batch: RowBatch, end: Tensor, features: dict[int, Tensor]) -> None:
        """In a graph too, by the capacity of ``batch``: consumes the prompt rows the target has just processed (their pages are shared); ``end`` int32 [B]: the position after the last row of each slot,
        0 where it has none. The token after a row is history[position + 1]: always known."""

    @abstractmethod
    def propose(self, slots: int, depth: int) -> None:
        """Writes nodes 1.. of state.tree_token, tree_parent, and tree_size (root included) of its slots, which is 1 until it does. What the host knows: at most ``slots`` active slots are its
        own (state.active says which), the largest max_depth among them is ``depth``."""

    def extend(self, features: dict[int, Tensor], slots: int, depth: int) -> None:
        """After a round: consumes the committed rows; ``slots``, ``depth`` as in ``propose``. state.path, path_len, emitted and row_offset are the round's, seq_lens is already the new length; row of the i-th
        committed token: row_offset[b] + path[b, i]."""

    def draft_logits(self) -> tuple[Tensor, Tensor] | None:
        """For rejection sampling: (q float32 [B, D, V] transformed draft logits by depth, q_levels int32 [B]), or None where drafts are a point mass."""
        return None
