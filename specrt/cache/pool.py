"""KVPool: the pages of one model's keys and values, all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specrt import ops


class LayerKV(NamedTuple):
    k: Tensor  # [pages, Hkv, P, D]
    v: Tensor
    k_scale: float
    v_scale: float


class KVPool:
    """k, v: [L, pages, Hkv, P, D] act or FP8 (e4m3), uninitialised: what nobody wrote never reaches an output (the tests fill free pages with NaN).
    A drafter has a pool of its own with the same page ids, so one block table serves both. scales: (k_scale, v_scale) by layer, for FP8; None: 1."""

    def __init__(self, layers: int, pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device,
                 scales: Sequence[tuple[float, float]] | None = None):
        shape = (layers, pages, kv_heads, page_size, head_dim)
        self.k: Tensor = torch.empty(shape, dtype=dtype, device=device)
        self.v: Tensor = torch.empty(shape, dtype=dtype, device=device)
        self.page_size = page_size
        self._scales = [(1.0, 1.0)] * layers if scales is None else list(scales)

    @property
    def fp8(self) -> bool:
        return self.k.dtype == ops.FP8

    def layers(self) -> Iterator[LayerKV]:
        return (LayerKV(k, v, *scales) for k, v, scales in zip(self.k.unbind(0), self.v.unbind(0), self._scales, strict=True))

    @staticmethod
    def bytes_per_page(layers: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * layers * kv_heads * page_size * head_dim * dtype.itemsize
