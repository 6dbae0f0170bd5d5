"""Linear: a packed weight and its bias. Several weights are stacked by output row into one: one op instead of three."""

from __future__ import annotations

import torch
from torch import Tensor

from specrt import ops
from specrt.weights.fp8 import Fp8Weight


class Linear:
    """y = x W^T + b in the canonical order (ops.linear)."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype, device: torch.device):
        """weights [N_i, K] of any float dtype, biases [N_i] or none of them; rounded to ``dtype`` here, once."""
        stacked = torch.cat([w.to(device=device, dtype=dtype) for w in weights]) if len(weights) > 1 else weights[0].to(device=device, dtype=dtype)
        self.out_features, self.in_features = stacked.shape
        self.weight = ops.pack_linear(stacked)
        self.bias = torch.cat([b.to(device=device, dtype=dtype) for b in biases]) if biases else None

    def __call__(self, x: Tensor, num_rows: Tensor, out: Tensor) -> None:
        ops.linear(x, self.weight, self.bias, num_rows, out)


class Fp8Linear:
    """y = x W^T + b with e4m3 weights; x is quantised on the way, for each row and 128 columns (ops.quantize_fp8, ops.linear_fp8)."""

    def __init__(self, weights: list[Fp8Weight], biases: list[Tensor], device: torch.device):
        """weights of [N_i, K], biases [N_i] or none of them; a bias is kept in float32."""
        self.out_features, self.in_features = sum(w.values.shape[0] for w in weights), weights[0].values.shape[1]
        # torch has no cat of e4m3: of the bytes.
        stacked = torch.cat([w.values.to(device).view(torch.uint8) for w in weights]).view(ops.FP8)
        self.weight = ops.pack_linear(stacked)
        blocks = max(w.scale.shape[0] for w in weights)
        self.scale = torch.cat([w.scale.to(device).expand(blocks, -1) for w in weights], dim=1).contiguous()
        self.bias = torch.cat([b.to(device=device, dtype=torch.float32) for b in biases]) if biases else None

    def __call__(self, x: Tensor, num_rows: Tensor, out: Tensor) -> None:
        # Short-lived, and as many as x has rows: from torch's pool (a captured graph's own).
        q = torch.empty_like(x, dtype=ops.FP8)
        scale = torch.empty(ops.fp8_scale_shape(*x.shape), dtype=torch.float32, device=x.device)
        ops.quantize_fp8(x, num_rows, q, scale)
        ops.linear_fp8(q, scale, self.weight, self.scale, self.bias, num_rows, out)
