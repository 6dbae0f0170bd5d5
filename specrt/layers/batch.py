"""RowBatch: what one forward pass works on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from specrt.ops import AttentionWorkspace


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
    workspace: AttentionWorkspace
    ancestors: Tensor | None = None
    paths: Tensor | None = None
    prefill: bool = False

    @property
    def rows(self) -> int:
        return self.token.shape[0]

    def head(self, rows: int) -> RowBatch:
        """The same rows with a smaller capacity (views): kernels choose their tiles by capacity, so it should be near what is in use."""
        if rows >= self.rows:
            return self
        cut = {name: getattr(self, name)[:rows] for name in ("token", "position", "request", "prefix", "slot")}
        return replace(self, **cut, ancestors=None if self.ancestors is None else self.ancestors[:rows],
                       paths=None if self.paths is None else self.paths[:rows])

    def with_tokens(self, token: Tensor) -> RowBatch:
        """The same rows with other tokens."""
        return replace(self, token=token)


def row_bucket(rows: int, capacity: int) -> int:
    """The capacity to use for at most ``rows`` rows: the next power of two, above 128 perhaps five eighths of it (linear has blocks of 160 tokens); a function of what the host knows
    without asking the device."""
    power = 1 << max(rows - 1, 0).bit_length()
    return min(5 * power // 8 if power > 128 and rows <= 5 * power // 8 else power, capacity)
