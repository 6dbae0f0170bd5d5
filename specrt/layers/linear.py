"""Linear: a packed weight and its bias."""

from __future__ import annotations

import torch
from torch import Tensor

from specrt import ops


class Linear:
    """y = x W^T + b in the canonical order (ops.linear). Several weights are stacked by output row into one: one op instead of three."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype, device: torch.device):
        """weights [N_i, K] of any float dtype, biases [N_i] or none of them; rounded to ``dtype`` here, once."""
        stacked = torch.cat([w.to(device=device, dtype=dtype) for w in weights]) if len(weights) > 1 else weights[0].to(device=device, dtype=dtype)
        self.out_features, self.in_features = stacked.shape
        self.weight = ops.pack_linear(stacked)
        self.bias = torch.cat([b.to(device=device, dtype=dtype) for b in biases]) if biases else None

    def __call__(self, x: Tensor, num_rows: Tensor, out: Tensor) -> None:
        ops.linear(x, self.weight, self.bias, num_rows, out)
