"""What linear does to its sums (csrc/gemm/params.h, Finish): a deferred RMSNorm, SiLU-mul, the residual add. Each fused form gives the bits of its parts, one after the other."""

import numpy as np
import pytest
import torch
from torch import Tensor

from specrt import ops
from specrt.layers.linear import alternate
from tests.kit.compare import assert_bits, assert_close, poisoned, rows
from tests.ops.test_norm import sums_of_squares

BF16, F32 = torch.bfloat16, torch.float32
DTYPES = [F32, BF16]
TOLERANCE = {F32: 2e-6, BF16: 8e-3}
SHAPES = [(64, 64), (576, 264), (1024, 1536), (5632, 264), (16512, 128)]  # (N, K); on CUDA: narrow pairs, pairs, wide pairs, one range
ROWS = [1, 3, 17, 64, 130, 300]


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(device)


def plain(x: Tensor, packed: Tensor, bias: Tensor | None, n: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(x), n, dtype=dtype, device=x.device)
    ops.linear(x, packed, bias, rows(len(x), x.device.type), out)
    return out


def squares_of(h: Tensor) -> Tensor:
    """As rms_scale writes them."""
    squares = torch.zeros(ops.squares_shape(*h.shape), device=h.device)
    ops.rms_scale(h, torch.ones_like(h[0]), rows(len(h), h.device.type), torch.empty_like(h), squares)
    return squares


def inverse_rms(squares: Tensor, width: int, eps: float) -> Tensor:
    """float32 [R, 1] in the order of csrc/base/squares.h."""
    blocks = -(-width // 64)
    lanes = torch.nn.functional.pad(squares[:, :blocks].cpu(), (0, -blocks % 128)).view(len(squares), -1, 32, 4)
    total = torch.zeros(len(squares), 32)
    for i in range(lanes.shape[1]):
        for e in range(4):
            total = total + lanes[:, i, :, e]
    for d in (16, 8, 4, 2, 1):
        total = total[:, :d] + total[:, d : 2 * d]
    return torch.from_numpy(np.float32(1) / np.sqrt(total.numpy() / np.float32(width) + np.float32(eps))).to(squares.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_a_deferred_norm(device, dtype, m, n, k):
    h, weight = 3 * random(m, k, dtype=dtype, device=device), random(k, dtype=dtype, device=device)
    w, b = random(n, k, dtype=dtype, device=device), random(n, dtype=dtype, device=device)
    packed, squares = ops.pack_linear(w), squares_of(h)
    scaled = (h.float() * weight.float()).to(dtype)
    out = poisoned(m, n, dtype=F32, device=device)
    ops.linear(scaled, packed, b, rows(m, device), out, squares, 1e-5)
    assert_bits(out, plain(scaled, packed, None, n, F32) * inverse_rms(squares, k, 1e-5) + b.float())
    norm = h.double() * torch.rsqrt(h.double().pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert_close(out, norm @ w.double().T + b.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_silu(device, dtype, m, n, k):
    inter = n // 2
    x, squares = random(m, k, dtype=dtype, device=device), squares_of(random(m, k, dtype=dtype, device=device))
    gate, up = ((random(inter, k, dtype=F32, device=device) * k**-0.5).to(dtype) for _ in range(2))
    b = random(n, dtype=dtype, device=device)
    packed = ops.pack_linear(alternate(gate, up))
    out, both = poisoned(m, inter, dtype=dtype, device=device), torch.empty(m, n, dtype=dtype, device=device)
    ops.linear_silu(x, packed, b, rows(m, device), out, squares, 1e-5)
    ops.linear(x, packed, b, rows(m, device), both, squares, 1e-5)
    g, u = both.view(m, -1, 2, 8).unbind(2)
    g, u = g.flatten(1), u.flatten(1)
    want = torch.nn.functional.silu(g.double()) * u.double()
    assert_close(out, want, TOLERANCE[dtype])
    if dtype == BF16:  # another exp rounds silu differently at times, and that by one step of bfloat16
        near = (torch.nn.functional.silu(g.float()).to(dtype).float() * u.float()).to(dtype)
        assert ((out.float() - near.float()).abs() <= 2**-7 * near.float().abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("n, k", [*SHAPES, (100, 72)])
def test_residual(device, dtype, m, n, k):
    x, residual, weight = random(m, k, dtype=dtype, device=device), random(m, n, dtype=dtype, device=device), random(n, dtype=dtype, device=device)
    w, b = random(n, k, dtype=dtype, device=device), random(n, dtype=dtype, device=device)
    packed, blocks = ops.pack_linear(w), -(-n // 64)
    h = (residual.float() + plain(x, packed, b, n, dtype).float()).to(dtype)
    new, scaled, squares = poisoned(m, n, dtype=dtype, device=device), poisoned(m, n, dtype=dtype, device=device), poisoned(*ops.squares_shape(m, n), dtype=F32, device=device)
    ops.linear_residual(x, packed, b, rows(m, device), residual, new, weight, scaled, squares)
    assert_bits(new, h)
    assert_bits(scaled, (h.float() * weight.float()).to(dtype))
    assert_bits(squares[:, :blocks], squares_of(h)[:, :blocks])
    alone = residual.clone()  # in place, and without what the next norm wants
    ops.linear_residual(x, packed, b, rows(m, device), alone, alone)
    assert_bits(alone, h)
    rest = torch.full_like(residual, 7.0)
    ops.linear_residual(x, packed, b, rows(m // 2, device), residual, rest, weight, scaled, squares)
    assert (rest[m // 2 :] == 7).all()
    assert_bits(rest[: m // 2], h[: m // 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_squares_sum_in_the_stated_order(device, dtype):
    """Squares of small integers times powers of two are exact: only the additions round, and their order shows."""
    h = (torch.randint(-64, 64, (70, 1000)) * 2.0 ** torch.randint(-9, 9, (70, 1000))).to(dtype).to(device)
    new, scaled, squares = torch.empty_like(h), torch.empty_like(h), poisoned(*ops.squares_shape(*h.shape), dtype=F32, device=device)
    x, w = torch.zeros(70, 64, dtype=dtype, device=device), torch.zeros(1000, 64, dtype=dtype, device=device)
    ops.linear_residual(x, ops.pack_linear(w), None, rows(70, device), h, new, h[0], scaled, squares)
    assert_bits(squares[:, :16], sums_of_squares(h.cpu()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(device, dtype):
    m, n, k = 300, 576, 1536
    x, residual, weight = random(m, k, dtype=dtype, device=device), random(m, n, dtype=dtype, device=device), random(n, dtype=dtype, device=device)
    packed = ops.pack_linear(random(n, k, dtype=dtype, device=device))
    every = [poisoned(m, n, dtype=dtype, device=device), poisoned(m, n, dtype=dtype, device=device), torch.zeros(ops.squares_shape(m, n), device=device)]
    ops.linear_residual(x, packed, None, rows(m, device), residual, every[0], weight, *every[1:])
    following = ops.pack_linear(random(1152, n, dtype=dtype, device=device))
    after = poisoned(m, 576, dtype=dtype, device=device)
    ops.linear_silu(every[1], following, None, rows(m, device), after, every[2], 1e-5)
    for size in (1, 2, 9, 16, 33, 64, 100, 129, 257):
        at = slice(m - size, m)
        some = [torch.empty_like(t[at]) for t in every]
        ops.linear_residual(x[at], packed, None, rows(size, device), residual[at], some[0], weight, *some[1:])
        for got, want in zip(some, every):
            assert_bits(got[:, :9], want[at, :9])
        assert_bits(some[1], every[1][at])
        out = torch.empty_like(after[at])
        ops.linear_silu(some[1], following, None, rows(size, device), out, some[2], 1e-5)
        assert_bits(out, after[at])


def test_wrong_arguments_are_named(device):
    x, w, n = torch.randn(2, 64, device=device), torch.randn(64, 64, device=device), rows(2, device)
    packed, h = ops.pack_linear(w), torch.randn(2, 64, device=device)
    with pytest.raises(RuntimeError, match=r"linear_residual.*next_weight.*together"):
        ops.linear_residual(x, packed, None, n, h, h, w[0])
    with pytest.raises(RuntimeError, match=r"linear_silu.*'out'.*I divisible by 8"):
        ops.linear_silu(x, packed, None, n, torch.empty(2, 4, device=device))
    with pytest.raises(RuntimeError, match=r"linear.*'squares'.*\[2, 5\]"):
        ops.linear(x, packed, None, n, h, torch.zeros(2, 5, device=device))
