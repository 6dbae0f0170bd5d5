"""RowBatch: what one forward pass works on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RowBatch:
    """Packed rows of one forward pass (all on one device). R is the capacity; ``num_rows`` rows are in use.

    token, position, request, prefix: int32 [R]; slot: int64 [R] (page * P + offset of the row's KV); ``prefix``: see ops.tree_attention.
    ancestors int64 [R] (verify) or paths int32 [R, depth] (draft expansion) or neither. ``prefill``: many rows a request, no tree
    (ops.prefill_attention); block_table int32 [B, max_pages]; workspace: ops.attention_workspace."""

    token: Tensor
    position: Tensor
    request: Tensor
    prefix: Tensor
    slot: Tensor
    num_rows: Tensor
    block_table: Tensor
    workspace: Tensor
    ancestors: Tensor | None = None
    paths: Tensor | None = None
    prefill: bool = False

    @property
    def rows(self) -> int:
        return self.token.shape[0]
