"""Linear: a packed weight and its bias. Several weights are stacked by output row into one: one op instead of three. Around the product the ops do what stands between
two matrices in a decoder layer: RMSNorm (deferred, ops.linear), SiLU-mul, residual add."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specrt import ops
from specrt.weights.fp8 import Fp8Weight


class Normed(NamedTuple):
    """Rows on their way through a deferred RMSNorm (ops.linear)."""

    scaled: Tensor  # [R, H]
    squares: Tensor  # ops.squares_shape(R, H)
    eps: float


def alternate(gate: Tensor, up: Tensor) -> Tensor:
    """Rows [I, ...] of each, in eights by turns (ops.linear_silu): [2I, ...]."""
    return torch.stack([gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))], dim=1).flatten(0, 2)


def stack(parts: list[Tensor], gate_up: bool) -> Tensor:
    if gate_up:
        return alternate(*parts)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Linear:
    """y = x W^T + b in the canonical order (ops.linear)."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype, device: torch.device, gate_up: bool = False):
        """weights [N_i, K] of any float dtype, biases [N_i] or none of them; rounded to ``dtype`` here, once. gate_up: two weights for ``silu``."""
        stacked = stack([w.to(device=device, dtype=dtype) for w in weights], gate_up)
        self.out_features, self.in_features = stacked.shape
        self.weight = ops.pack_linear(stacked)
        self.bias = stack([b.to(device=device, dtype=dtype) for b in biases], gate_up) if biases else None

    def __call__(self, x: Tensor, num_rows: Tensor, out: Tensor) -> None:
        ops.linear(x, self.weight, self.bias, num_rows, out)

    def sample(self, x: Tensor, num_rows: Tensor, request: Tensor, position: Tensor, seeds: Tensor, sampling_f: Tensor, token: Tensor, status: Tensor,
               logprob: Tensor | None) -> None:
        """As lm_head: the tokens of rows that need no logits (ops.linear_sample)."""
        ops.linear_sample(x, self.weight, self.out_features, num_rows, request, position, seeds, sampling_f, token, status, logprob)

    def normed(self, x: Normed, num_rows: Tensor, out: Tensor) -> None:
        """Of RMSNorm(h)."""
        ops.linear(x.scaled, self.weight, self.bias, num_rows, out, x.squares, x.eps)

    def silu(self, x: Normed, num_rows: Tensor, out: Tensor) -> None:
        """silu(gate) * up of RMSNorm(h)."""
        ops.linear_silu(x.scaled, self.weight, self.bias, num_rows, out, x.squares, x.eps)

    def add(self, x: Tensor, num_rows: Tensor, residual: Tensor, out: Tensor, next_weight: Tensor | None, normed: Normed) -> None:
        """out = residual + y, and with next_weight the first half of its RMSNorm into ``normed``."""
        if next_weight is None:
            ops.linear_residual(x, self.weight, self.bias, num_rows, residual, out)
        else:
            ops.linear_residual(x, self.weight, self.bias, num_rows, residual, out, next_weight, normed.scaled, normed.squares)


class Fp8Linear:
    """The same with e4m3 weights; x is quantised on the way, for each row and 128 columns (ops.linear_fp8)."""

    def __init__(self, weights: list[Fp8Weight], biases: list[Tensor], device: torch.device, gate_up: bool = False):
        """weights of [N_i, K], biases [N_i] or none of them; a bias is kept in float32. gate_up: two weights for ``silu``."""
        # torch has no cat of e4m3: of the bytes.
        stacked = stack([w.values.to(device).view(torch.uint8) for w in weights], gate_up).view(ops.FP8)
        self.out_features, self.in_features = stacked.shape
        self.weight = ops.pack_linear(stacked)
        blocks = max(w.scale.shape[0] for w in weights)
        self.scale = stack([w.scale.to(device).expand(blocks, -1).T for w in weights], gate_up).T.contiguous()
        self.bias = stack([b.to(device=device, dtype=torch.float32) for b in biases], gate_up) if biases else None

    def __call__(self, x: Tensor, num_rows: Tensor, out: Tensor) -> None:
        ops.linear_fp8(x, self.weight, self.scale, self.bias, num_rows, out)

    def normed(self, x: Normed, num_rows: Tensor, out: Tensor) -> None:
        ops.linear_fp8(x.scaled, self.weight, self.scale, self.bias, num_rows, out, x.squares, x.eps)

    def silu(self, x: Normed, num_rows: Tensor, out: Tensor) -> None:
        ops.linear_fp8_silu(x.scaled, self.weight, self.scale, self.bias, num_rows, out, x.squares, x.eps)

    def add(self, x: Tensor, num_rows: Tensor, residual: Tensor, out: Tensor, next_weight: Tensor | None, normed: Normed) -> None:
        if next_weight is None:
            ops.linear_fp8_residual(x, self.weight, self.scale, self.bias, num_rows, residual, out)
        else:
            ops.linear_fp8_residual(x, self.weight, self.scale, self.bias, num_rows, residual, out, next_weight, normed.scaled, normed.squares)
