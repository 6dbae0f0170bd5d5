"""What linear does to its sums (csrc/gemm/params.h, Finish): a deferred RMSNorm, SiLU-mul, the residual add. Each fused form gives the bits of its parts, one after the other."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from specrt import ops
from specrt.layers.linear import alternate
from specrt.weights.fp8 import quantized
from tests.kit.compare import assert_bits, assert_close, poisoned, rows
from tests.ops.test_linear_fp8 import dequantized, quantize
from tests.ops.test_norm import sums_of_squares

BF16, F32 = torch.bfloat16, torch.float32
TOLERANCE = {F32: 2e-6, BF16: 8e-3}
SHAPES = [(64, 64), (576, 264), (1024, 1536), (5760, 264), (16512, 128)]  # (N, K); on CUDA: narrow pairs, pairs, wide pairs, one range
ROWS = [1, 3, 17, 64, 130, 230, 300]


class Kind(NamedTuple):
    dtype: torch.dtype  # of activations
    fp8: bool = False  # weights, and x on its way to them

    def depth(self, k: int) -> int:
        """The next K that the kernels take."""
        return -(-k // 16) * 16 if self.fp8 else k


def of_kinds(test):
    kinds = {"float32": Kind(F32), "bfloat16": Kind(BF16), "fp8-float32": Kind(F32, True), "fp8-bfloat16": Kind(BF16, True)}
    return pytest.mark.parametrize("kind", kinds.values(), ids=kinds)(test)


class Layer:
    """A packed weight and its bias behind the ops of its kind; of all rows of x unless ``used`` says how many."""

    def __init__(self, kind: Kind, weight: Tensor, bias: Tensor | None = None):
        self.kind, self.n, self.bias = kind, len(weight), bias
        if kind.fp8:
            weight, self.scale = quantized(weight)
            self.bias = None if bias is None else bias.float()
        self.weight, self.packed = weight, ops.pack_linear(weight)

    def product(self, x: Tensor, bias: Tensor | None, used: int | None = None) -> tuple:
        """The arguments that all ops begin with."""
        n = rows(len(x) if used is None else used, x.device.type)
        return (x, self.packed, self.scale, bias, n) if self.kind.fp8 else (x, self.packed, bias, n)

    def sums(self, x: Tensor) -> Tensor:
        """float32, without the bias."""
        out = torch.empty(len(x), self.n, device=x.device)
        (ops.linear_fp8 if self.kind.fp8 else ops.linear)(*self.product(x, None), out)
        return out

    def exact(self, x: Tensor) -> Tensor:
        """The same in float64."""
        if not self.kind.fp8:
            return x.double() @ self.weight.double().T
        return dequantized(*quantize(x)) @ (self.weight.double() * self.scale.T.double()).T

    def linear(self, x: Tensor, out: Tensor, *norm) -> None:
        (ops.linear_fp8 if self.kind.fp8 else ops.linear)(*self.product(x, self.bias), out, *norm)

    def silu(self, x: Tensor, out: Tensor, *norm) -> None:
        (ops.linear_fp8_silu if self.kind.fp8 else ops.linear_silu)(*self.product(x, self.bias), out, *norm)

    def residual(self, x: Tensor, residual: Tensor, new: Tensor, *next_norm, used: int | None = None) -> None:
        (ops.linear_fp8_residual if self.kind.fp8 else ops.linear_residual)(*self.product(x, self.bias, used), residual, new, *next_norm)


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(device)


def squares_of(h: Tensor) -> Tensor:
    """As embedding writes them."""
    squares = torch.zeros(ops.squares_shape(*h.shape), device=h.device)
    ids = torch.arange(len(h), dtype=torch.int32, device=h.device)
    ops.embedding(h, ids, torch.ones_like(h[0]), rows(len(h), h.device.type), torch.empty_like(h), torch.empty_like(h), squares)
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


@of_kinds
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("n, k", [*SHAPES, (72, 4200), (72, 8456)])  # the last: 66 and 133 blocks of squares
def test_a_deferred_norm(device, kind, m, n, k):
    k, dtype = kind.depth(k), kind.dtype
    h, weight = 3 * random(m, k, dtype=dtype, device=device), random(k, dtype=dtype, device=device)
    b = random(n, dtype=dtype, device=device)
    layer, squares = Layer(kind, random(n, k, dtype=dtype, device=device), b), squares_of(h)
    scaled = (h.float() * weight.float()).to(dtype)
    for out_dtype in (F32, dtype):
        out = poisoned(m, n, dtype=out_dtype, device=device)
        layer.linear(scaled, out, squares, 1e-5)
        assert_bits(out, (layer.sums(scaled) * inverse_rms(squares, k, 1e-5) + b.float()).to(out_dtype))
    r = torch.rsqrt(h.double().pow(2).mean(-1, keepdim=True) + 1e-5)
    carried = 1e-3 if kind.fp8 and device == "cuda" else 0  # by the tensor cores' sums of e4m3
    assert_close(out, layer.exact(scaled) * r + b.double(), max(TOLERANCE[dtype], carried))


@of_kinds
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_silu(device, kind, m, n, k):
    inter, k, dtype = n // 2, kind.depth(k), kind.dtype
    x, squares = random(m, k, dtype=dtype, device=device), squares_of(random(m, k, dtype=dtype, device=device))
    gate, up = ((random(inter, k, dtype=F32, device=device) * k**-0.5).to(dtype) for _ in range(2))
    layer = Layer(kind, alternate(gate, up), random(n, dtype=dtype, device=device))
    out, both = poisoned(m, inter, dtype=dtype, device=device), torch.empty(m, n, dtype=dtype, device=device)
    layer.silu(x, out, squares, 1e-5)
    layer.linear(x, both, squares, 1e-5)
    g, u = both.view(m, -1, 2, 8).unbind(2)
    g, u = g.flatten(1), u.flatten(1)
    want = torch.nn.functional.silu(g.double()) * u.double()
    assert_close(out, want, TOLERANCE[dtype])
    if dtype == BF16:  # another exp rounds silu differently at times, and that by one step of bfloat16
        near = (torch.nn.functional.silu(g.float()).to(dtype).float() * u.float()).to(dtype)
        assert ((out.float() - near.float()).abs() <= 2**-7 * near.float().abs()).all()


@pytest.mark.parametrize("m", [16, 100])
def test_silu_of_every_gate(device, m):
    """CUDA multiplies by an approximate reciprocal: in bfloat16 that must give the bits of the CPU, which divides, for every gate there is. They come as a bias: a product of an infinite one
    with 0 would be NaN, and the CPU's products may read subnormal ones as 0."""
    gate = torch.arange(1 << 16).to(torch.uint16).view(BF16)
    weight, bias = torch.zeros(2 << 16, 8, dtype=BF16), alternate(gate, torch.ones_like(gate))

    def silu(m: int, device: str) -> Tensor:
        out = poisoned(m, len(gate), dtype=BF16, device=device)
        Layer(Kind(BF16), weight.to(device), bias.to(device)).silu(torch.zeros(m, 8, dtype=BF16, device=device), out, None, 0.0)
        return out.cpu()

    want, number = silu(1, "cpu"), ~gate.isnan()
    usual = gate.isfinite() & (gate > -88)  # below, exp saturates (csrc/base/math.h)
    exact = torch.nn.functional.silu(gate[usual].double())
    assert ((want[0, usual].double() - exact).abs() <= 2**-8 * exact.abs() + 2**-133).all()
    out = silu(m, device)
    for some in (want, out):
        assert (some.isnan() == ~number).all()
    assert_bits(out[:, number], want[:, number].expand(m, -1))


@of_kinds
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("n, k", [*SHAPES, (100, 72)])
def test_residual(device, kind, m, n, k):
    k, dtype, blocks = kind.depth(k), kind.dtype, -(-n // 64)
    x, residual, weight = random(m, k, dtype=dtype, device=device), random(m, n, dtype=dtype, device=device), random(n, dtype=dtype, device=device)
    layer, y = Layer(kind, random(n, k, dtype=dtype, device=device), random(n, dtype=dtype, device=device)), torch.empty(m, n, dtype=dtype, device=device)
    layer.linear(x, y)
    h = (residual.float() + y.float()).to(dtype)
    new, scaled, squares = poisoned(m, n, dtype=dtype, device=device), poisoned(m, n, dtype=dtype, device=device), poisoned(*ops.squares_shape(m, n), dtype=F32, device=device)
    layer.residual(x, residual, new, weight, scaled, squares)
    assert_bits(new, h)
    assert_bits(scaled, (h.float() * weight.float()).to(dtype))
    assert_bits(squares[:, :blocks], squares_of(h)[:, :blocks])
    alone = residual.clone()  # in place, and without what the next norm wants
    layer.residual(x, alone, alone)
    assert_bits(alone, h)
    rest = torch.full_like(residual, 7.0)
    layer.residual(x, residual, rest, weight, scaled, squares, used=m // 2)
    assert (rest[m // 2 :] == 7).all()
    assert_bits(rest[: m // 2], h[: m // 2])


@of_kinds
@pytest.mark.parametrize("n", [1024, 5760, 16512])  # on CUDA: pairs, ranges in turn, one range
def test_any_number_of_a_thousand_rows(device, kind, n):
    m, k, dtype = 1000, kind.depth(72), kind.dtype
    x, residual = random(m, k, dtype=dtype, device=device), random(m, n, dtype=dtype, device=device)
    layer, every = Layer(kind, random(n, k, dtype=dtype, device=device)), poisoned(m, n, dtype=dtype, device=device)
    layer.residual(x, residual, every)
    for used in (0, 257, 700):
        some = torch.full_like(residual, 7.0)
        layer.residual(x, residual, some, used=used)
        assert (some[used:] == 7).all()
        assert_bits(some[:used], every[:used])


@of_kinds
def test_the_squares_sum_in_the_stated_order(device, kind):
    """Squares of small integers times powers of two are exact: only the additions round, and their order shows."""
    dtype = kind.dtype
    h = (torch.randint(-64, 64, (70, 1000)) * 2.0 ** torch.randint(-9, 9, (70, 1000))).to(dtype).to(device)
    new, scaled, squares = torch.empty_like(h), torch.empty_like(h), poisoned(*ops.squares_shape(*h.shape), dtype=F32, device=device)
    x, w = torch.zeros(70, 64, dtype=dtype, device=device), torch.zeros(1000, 64, dtype=dtype, device=device)
    Layer(kind, w).residual(x, h, new, h[0], scaled, squares)
    assert_bits(squares[:, :16], sums_of_squares(h.cpu()))


@of_kinds
def test_a_row_does_not_depend_on_the_others(device, kind):
    m, n, k, dtype = 300, 576, 1536, kind.dtype
    x, residual, weight = random(m, k, dtype=dtype, device=device), random(m, n, dtype=dtype, device=device), random(n, dtype=dtype, device=device)
    layer = Layer(kind, random(n, k, dtype=dtype, device=device))
    every = [poisoned(m, n, dtype=dtype, device=device), poisoned(m, n, dtype=dtype, device=device), torch.zeros(ops.squares_shape(m, n), device=device)]
    layer.residual(x, residual, every[0], weight, *every[1:])
    following = Layer(kind, random(1152, n, dtype=dtype, device=device))
    after = poisoned(m, 576, dtype=dtype, device=device)
    following.silu(every[1], after, every[2], 1e-5)
    for size in (1, 2, 9, 16, 33, 64, 100, 129, 257):
        at = slice(m - size, m)
        some = [torch.empty_like(t[at]) for t in every]
        layer.residual(x[at], residual[at], some[0], weight, *some[1:])
        for got, want in zip(some, every):
            assert_bits(got[:, :9], want[at, :9])
        assert_bits(some[1], every[1][at])
        out = torch.empty_like(after[at])
        following.silu(some[1], out, some[2], 1e-5)
        assert_bits(out, after[at])


@pytest.mark.parametrize("kind", [Kind(F32), Kind(F32, True)], ids=["float32", "fp8"])
def test_wrong_arguments_are_named(device, kind):
    name = "linear_fp8" if kind.fp8 else "linear"
    x, h, layer = torch.randn(2, 64, device=device), torch.randn(2, 64, device=device), Layer(kind, torch.randn(64, 64, device=device))
    with pytest.raises(RuntimeError, match=rf"{name}_residual.*next_weight.*together"):
        layer.residual(x, h, h, h[0].clone())
    with pytest.raises(RuntimeError, match=rf"{name}_residual.*'scaled'.*\[2, 64\]"):
        layer.residual(x, h, h, h[0].clone(), torch.zeros(2, 5, device=device), torch.zeros(2, 4, device=device))
    with pytest.raises(RuntimeError, match=rf"{name}_silu.*'out'.*I divisible by 8"):
        layer.silu(x, torch.empty(2, 4, device=device))
    with pytest.raises(RuntimeError, match=rf"{name}:.*'squares'.*\[2, 5\]"):
        layer.linear(x, h, torch.zeros(2, 5, device=device))
