"""Stacked weights: each part's outputs are those it has alone."""

import pytest
import torch

from specrt import ops
from specrt.layers.linear import Fp8Linear, Linear, Normed
from specrt.weights.fp8 import Fp8Weight
from tests.kit.compare import assert_bits, assert_close, rows

F32 = torch.float32


def weights(kind, n, k, device):
    """A part's weight of a kind: float32, FP8 with a scale an output, FP8 with one for each 128 k too."""
    if kind == "float32":
        return torch.randn(n, k, device=device)
    scale = torch.rand(-(-k // 128) if kind == "blocks" else 1, n, device=device) + 0.5
    return Fp8Weight(torch.randn(n, k, device=device).to(ops.FP8), scale)


def layer(kind, parts, biases, device, gate_up=False):
    return Linear(parts, biases, F32, device, gate_up) if kind == "float32" else Fp8Linear(parts, biases, device, gate_up)


@pytest.mark.parametrize("kind", ["float32", "channels", "blocks"])
def test_parts(device, kind):
    k, n, device = 272, rows(5, device), torch.device(device)
    x, sizes = torch.randn(5, k, device=device), (48, 16, 80)
    parts, biases = [weights(kind, size, k, device) for size in sizes], [torch.randn(size, device=device) for size in sizes]
    out = torch.empty(5, sum(sizes), device=device)
    layer(kind, parts, biases, device)(x, n, out)
    for part, bias, got in zip(parts, biases, out.split(sizes, dim=1)):
        alone = torch.empty_like(got, memory_format=torch.contiguous_format)
        layer(kind, [part], [bias], device)(x, n, alone)
        assert_bits(got, alone)


@pytest.mark.parametrize("kind", ["float32", "channels", "blocks"])
def test_gate_and_up(device, kind):
    """SiLU-mul of a normed row, from parts that are layers of their own."""
    k, inter, n, device = 272, 200, rows(5, device), torch.device(device)
    x = Normed(torch.randn(5, k, device=device), torch.rand(ops.squares_shape(5, k), device=device) + 1, 1e-5)
    parts, biases = [weights(kind, inter, k, device) for _ in range(2)], [torch.randn(inter, device=device) for _ in range(2)]
    out, gate, up = (torch.empty(5, inter, device=device) for _ in range(3))
    layer(kind, parts, biases, device, gate_up=True).silu(x, n, out)
    for part, bias, alone in zip(parts, biases, (gate, up)):
        layer(kind, [part], [bias], device).normed(x, n, alone)
    assert_close(out, torch.nn.functional.silu(gate.double()) * up.double(), 2e-6)
