"""Logits of a drafter's own vocabulary over the target's tokens."""

from __future__ import annotations

from torch import Tensor

_NEVER = -1e30  # the raw logit of a token that the drafter does not have: finite, for an infinite one would mark the row as broken


def over_target(own: Tensor, ids: Tensor | None, out: Tensor) -> None:
    """own float32 [R, D] -> out [R, V]. ids int64 [D]: the target's id of each; None = the same ids, where one vocabulary may be padded further."""
    if ids is not None:
        out.fill_(_NEVER)
        out.index_copy_(1, ids, own)
        return
    shared = min(own.shape[1], out.shape[1])
    out[:, :shared].copy_(own[:, :shared])
    out[:, shared:] = _NEVER
