import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specrt import ops
from tests.kit.compare import assert_bits, assert_close, poisoned, rows

BF16, F32 = torch.bfloat16, torch.float32
FORMS = [(F32, F32), (BF16, BF16), (BF16, F32)]  # dtype of x and W, dtype of out
WIDE = (16400, 264)  # (N, K): so wide that CUDA takes all of K as one range
TURNS = [(5640, 264), (5640, 56)]  # on CUDA: pairs of CTAs up to 256 rows, the ranges in turn above; of the second, one range is empty
# Gaussian inputs: the sums' own rounding, or the one rounding to bf16.
TOLERANCE = {F32: 2e-6, BF16: 4e-3}


def inputs(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(shape).to(dtype).to(device) for shape in ((m, k), (n, k), (n,)))


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int, out_dtype: torch.dtype, num_rows: int | None = None) -> Tensor:
    out = poisoned(len(x), n, dtype=out_dtype, device=x.device.type)
    ops.linear(x, packed, bias, rows(len(x) if num_rows is None else num_rows, x.device.type), out)
    return out


@pytest.mark.parametrize("dtype, out_dtype", FORMS)
@pytest.mark.parametrize("m", [1, 3, 17, 64, 65, 160, 230, 300])
@pytest.mark.parametrize("n, k", [(8, 8), (100, 64), (576, 576), (960, 1000), (1000, 1536), TURNS[0], WIDE])
def test_linear_matches_float64(device, dtype, out_dtype, m, n, k):
    x, w, b = inputs(m, n, k, dtype, device)
    want = x.double() @ w.double().T
    assert_close(linear(x, ops.pack_linear(w), None, n, out_dtype), want, TOLERANCE[out_dtype])
    assert_close(linear(x, ops.pack_linear(w), b, n, out_dtype), want + b.double(), TOLERANCE[out_dtype])


def test_many_tiles_of_a_single_step(device):
    """On CUDA: more than four tiles for each cluster, the ranges in turn, the first of them empty."""
    x, w, _ = inputs(3000, 5640, 56, BF16, device)
    packed = ops.pack_linear(w)
    every = linear(x, packed, None, 5640, BF16)
    assert_close(every, x.double() @ w.double().T, TOLERANCE[BF16])
    assert_bits(linear(x[-3:].clone(), packed, None, 5640, BF16), every[-3:])


@pytest.mark.parametrize("dtype, k", [(F32, 1), (F32, 577), (BF16, 1), (BF16, 577)])
def test_odd_k_on_the_cpu(dtype, k):
    x, w, b = inputs(7, 65, k, dtype, "cpu")
    assert_close(linear(x, ops.pack_linear(w), b, 65, F32), x.double() @ w.double().T + b.double(), TOLERANCE[F32])


@pytest.mark.parametrize("dtype, out_dtype", FORMS)
@pytest.mark.parametrize("n, k", [(100, 64), (576, 1000), (960, 4096), *TURNS, WIDE])
def test_a_row_does_not_depend_on_the_others(device, dtype, out_dtype, n, k):
    x, w, b = inputs(300, n, k, dtype, device)
    w = ops.pack_linear(w)
    every = linear(x, w, b, n, out_dtype)
    for m in (1, 2, 5, 6, 7, 8, 9, 16, 17, 33, 64, 65, 97, 129, 201, 257):
        at = 300 - m
        assert_bits(linear(x[at:].clone(), w, b, n, out_dtype), every[at:])
    for r in range(0, 300, 23):  # alone, and at every place of a small and a large call
        assert_bits(linear(x[r : r + 1].clone(), w, b, n, out_dtype)[0], every[r])
    for m in (8, 64, 300):
        assert_bits(linear(x[:1].repeat(m, 1), w, b, n, out_dtype), every[:1].repeat(m, 1))
    assert_bits(linear(x, w, b, n, out_dtype, num_rows=5)[:5], every[:5])  # fewer rows in use than there is room for


@pytest.mark.parametrize("dtype, out_dtype", FORMS)
@pytest.mark.parametrize("capacity", [7, 64, 300])
def test_a_nan_row_stays_alone_and_rows_past_num_rows_are_untouched(device, dtype, out_dtype, capacity):
    x, w, _ = inputs(capacity, 200, 136, dtype, device)
    w = ops.pack_linear(w)
    want = linear(x, w, None, 200, out_dtype)
    x[2] = float("nan")
    x[5:] = float("nan")
    for used in (5, 0):
        out = torch.full((capacity, 200), 7.0, dtype=out_dtype, device=device)
        ops.linear(x, w, None, rows(used, device), out)
        assert (out[used:] == 7).all()
        if used:
            assert torch.isnan(out[2].float()).all()
            assert_bits(out[[0, 1, 3, 4]], want[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype, out_dtype", FORMS)
def test_lm_head_with_float32_logits_is_rounded_once(device, dtype, out_dtype):
    """The bfloat16 output is the float32 output rounded: bias and all partial sums are fp32."""
    x, w, b = inputs(9, 1000, 576, dtype, device)
    w = ops.pack_linear(w)
    assert_bits(linear(x, w, b, 1000, out_dtype), linear(x, w, b, 1000, F32).to(out_dtype))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """round32(a b + c), float32 in float64 storage: the product is exact, the sum is rounded to odd, so the last rounding is the only one."""
    p = a * b
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    even = (s.view(torch.int64) & 1) == 0
    s = torch.where((error != 0) & even, torch.nextafter(s, torch.copysign(torch.full_like(s, torch.inf), error)), s)
    return s.float().double()


@pytest.mark.parametrize("dtype, k", [(F32, 100), (BF16, 256), (BF16, 101)])
def test_the_cpu_order_is_the_documented_one(dtype, k):
    x, w, b = inputs(9, 70, k, dtype, "cpu")
    x *= torch.exp2(torch.randint(-6, 7, x.shape)).to(dtype)  # orders of magnitude apart: another order shows
    a, c = x.double()[:, None, :], w.double()[None, :, :]
    acc = torch.zeros(9, 70, dtype=torch.float64)
    step = 2 if dtype == BF16 else 1
    for at in range(0, k, step):
        for i in reversed(range(at, min(at + step, k))):  # the pair's odd product first
            acc = fma(a[..., i], c[..., i], acc)
    assert_bits(linear(x, ops.pack_linear(w), b, 70, F32), acc.float() + b.float())


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_the_portable_kernels_give_the_bits_of_the_fast_ones(tmp_path):
    root = Path(__file__).parents[2]
    program = tmp_path / "linear_paths"
    sources = [root / "tests/ops/linear_paths.cpp", root / "csrc/gemm/kernels_cpu.cpp"]
    subprocess.run(["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-I", root / "csrc", *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_packing_is_the_documented_layout_on_the_cpu():
    for dtype, g in ((F32, 1), (BF16, 2)):
        w = torch.randn(100, 9).to(dtype)
        padded = torch.zeros(128, 10).to(dtype)
        padded[:100, :9] = w
        want = padded[:, : (9 + g - 1) // g * g].reshape(2, 64, -1, g).transpose(1, 2)
        assert_bits(ops.pack_linear(w), want)


@pytest.mark.parametrize("n, k", [(100, 72), (64, 64), (130, 8)])
def test_packing_is_the_documented_layout_on_cuda(n, k):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    w = torch.randn(n, k).to(BF16).cuda()
    padded = torch.zeros((n + 63) // 64 * 64, (k + 63) // 64 * 64, dtype=BF16, device="cuda")
    padded[:n, :k] = w
    blocks = padded.reshape(-1, 64, padded.shape[1] // 64, 8, 8).transpose(1, 2)  # [N/64, K/64, 64 outputs, 8 chunks, 8]
    output, chunk = torch.arange(64, device="cuda")[:, None], torch.arange(8, device="cuda")
    want = torch.empty_like(blocks)
    want[:, :, output, chunk ^ output % 8] = blocks[:, :, output, chunk]
    assert_bits(ops.pack_linear(w), want.flatten(3))


def test_a_wrong_argument_is_named(device):
    x, w, b = inputs(4, 100, 64, BF16, device)
    w, out = ops.pack_linear(w), torch.empty(4, 100, dtype=BF16, device=device)
    good = dict(x=x, weight=w, bias=b, num_rows=rows(4, device), out=out)
    for name, bad, message in [
        ("x", x[:, ::2], r"linear.*'x'.*strided view.*contiguous"),
        ("x", x.half(), r"linear.*'x'.*float16.*float32 or bfloat16"),
        ("weight", ops.pack_linear(torch.zeros(100, 72, dtype=BF16, device=device)), r"linear.*'weight'.*shape"),
        ("weight", w.float(), r"linear.*'weight'.*float32.*bfloat16"),
        ("bias", b[:99].clone(), r"linear.*'bias'.*\[99\].*N = 100"),
        ("num_rows", torch.tensor([4], device=device), r"linear.*'num_rows'.*int64.*int32"),
        ("out", out[:3].clone(), r"linear.*'out'.*\[3, 100\].*R = 4"),
        ("out", out.half(), r"linear.*'out'.*float16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.linear(**{**good, name: bad})
    if device == "cuda":
        odd = inputs(4, 100, 68, BF16, device)
        with pytest.raises(RuntimeError, match=r"linear.*'x'.*divisible by 8.*K = 68"):
            ops.linear(odd[0], odd[1], None, rows(4, device), out)
