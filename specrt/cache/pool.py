"""KVPool: the pages of one model's keys and values, all layers."""

from __future__ import annotations

import torch
from torch import Tensor


class KVPool:
    """k, v: [L, pages, Hkv, P, D] act, uninitialised: what nobody wrote never reaches an output (the tests fill free pages with NaN).
    A drafter has a pool of its own with the same page ids, so one block table serves both."""

    def __init__(self, layers: int, pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        shape = (layers, pages, kv_heads, page_size, head_dim)
        self.k: Tensor = torch.empty(shape, dtype=dtype, device=device)
        self.v: Tensor = torch.empty(shape, dtype=dtype, device=device)
        self.page_size = page_size

    @staticmethod
    def bytes_per_page(layers: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * layers * kv_heads * page_size * head_dim * dtype.itemsize
