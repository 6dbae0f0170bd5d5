import pytest
import torch
from torch import Tensor

from specrt import ops
from tests.kit.compare import assert_bits, assert_close, poisoned, rows

BF16, F32, FP8 = torch.bfloat16, torch.float32, ops.FP8
# The tensor cores' sums of e4m3 carry about 14 bits; then the one rounding.
TOLERANCE = {("cpu", F32): 2e-6, ("cuda", F32): 1e-3, ("cpu", BF16): 4e-3, ("cuda", BF16): 4e-3}
SHAPES = [(8, 16), (100, 64), (576, 576), (200, 144), (1000, 1536), (5640, 272), (16400, 272)]  # N, K; the last: all of K in one range on CUDA


def weight(n: int, k: int, blocks: bool, device: str) -> tuple[Tensor, Tensor]:
    values = (100 * torch.randn(n, k)).clamp(-448, 448).to(FP8).to(device)
    return values, (torch.randn((k + 127) // 128 if blocks else 1, n).exp() * 1e-3).to(device)


def quantize(x: Tensor, used: int | None = None) -> tuple[Tensor, Tensor]:
    q = torch.full(x.shape, 0x7F, dtype=torch.uint8, device=x.device).view(FP8)
    scale = poisoned(*ops.fp8_scale_shape(*x.shape), dtype=F32, device=x.device.type)
    ops.quantize_fp8(x, rows(len(x) if used is None else used, x.device.type), q, scale)
    return q, scale


def dequantized(q: Tensor, scale: Tensor) -> Tensor:
    """float64 of quantised rows."""
    return q.double() * scale[:, : len(q)].T.double().repeat_interleave(128, 1)[:, : q.shape[1]]


def linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, used: int | None = None) -> Tensor:
    out = poisoned(len(x), scale.shape[1], dtype=out_dtype, device=x.device.type)
    ops.linear_fp8(x, packed, scale, bias, rows(len(x) if used is None else used, x.device.type), out)
    return out


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_quantised_rows_are_those_of_torch(device, dtype):
    """Every element: the scale is max / 448, the value the nearest e4m3 of x / scale."""
    x = (torch.randn(37, 400) * torch.logspace(-30, 30, 400)).to(dtype).to(device)
    x[3], x[4, 128:256] = 0, 0
    q, scale = quantize(x)
    for b in range(4):
        part = x[:, 128 * b : 128 * b + 128].float().cpu()
        want = part.abs().amax(1) / 448
        want = torch.where(want < torch.finfo(F32).tiny, 1.0, want)
        assert_bits(scale[b, :37], want)
        assert_bits(q[:, 128 * b : 128 * b + 128], (part / want[:, None]).to(FP8))


@pytest.mark.parametrize("scale", [1.0, 2.0**-140, 2.0**100, 1 / 3])
def test_values_at_the_boundaries_of_e4m3_round_as_torch_has_them(device, scale):
    """Every value, every boundary between two and its neighbours, both zeros; as quotients exact where the scale is a power of two."""
    values = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    between = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, between, torch.nextafter(between, torch.tensor(0.0)), torch.nextafter(between, torch.tensor(500.0))])
    rows_of_127 = torch.nn.functional.pad(torch.cat([near, -near]), (0, -2 * len(near) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(rows_of_127, (0, 1), value=448.0) * scale
    q, s = quantize(x.to(device))
    want = x.abs().amax(1) / 448
    want = torch.where(want < torch.finfo(F32).tiny, 1.0, want)
    assert_bits(s[0, : len(x)], want)
    assert_bits(q, (x / want[:, None]).to(FP8))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("out_dtype", [BF16, F32])
@pytest.mark.parametrize("m", [1, 3, 17, 64, 65, 160, 300])
@pytest.mark.parametrize("n, k", SHAPES)
def test_linear_fp8_matches_float64(device, out_dtype, m, n, k, blocks):
    x, (values, scale), bias = torch.randn(m, k).to(BF16).to(device), weight(n, k, blocks, device), torch.randn(n, device=device)
    of_k = scale.repeat_interleave(128, 0)[:k] if blocks else scale
    want = dequantized(*quantize(x)) @ (values.double() * of_k.T.double()).T
    packed = ops.pack_linear(values)
    assert_close(linear(x, packed, scale, None, out_dtype), want, TOLERANCE[device, out_dtype])
    assert_close(linear(x, packed, scale, bias, out_dtype), want + bias.double(), TOLERANCE[device, out_dtype])


@pytest.mark.parametrize("n, k, blocks", [(100, 64, False), (576, 1008, True), (960, 4096, False), (5640, 272, True), (16400, 272, False), (5760, 1536, False), (16512, 1536, True)])
def test_a_row_does_not_depend_on_the_others(device, n, k, blocks):
    """Nor on who quantises it: on CUDA few rows the product itself does, beyond that a kernel of its own."""
    x, (values, scale), bias = torch.randn(300, k).to(BF16).to(device), weight(n, k, blocks, device), torch.randn(n, device=device)
    packed = ops.pack_linear(values)
    every = linear(x, packed, scale, bias, BF16)
    for m in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 64, 65, 97, 129, 200, 257):
        assert_bits(linear(x[300 - m :].clone(), packed, scale, bias, BF16), every[300 - m :])
    for r in range(0, 300, 23):
        assert_bits(linear(x[r : r + 1].clone(), packed, scale, bias, BF16)[0], every[r])
    for m in (8, 64, 300):
        assert_bits(linear(x[:1].repeat(m, 1), packed, scale, bias, BF16), every[:1].repeat(m, 1))
    assert_bits(linear(x, packed, scale, bias, BF16, used=5)[:5], every[:5])


@pytest.mark.parametrize("capacity", [7, 64, 300])
def test_a_nan_row_stays_alone_and_rows_past_num_rows_are_untouched(device, capacity):
    x, (values, scale) = torch.randn(capacity, 144).to(BF16).to(device), weight(200, 144, False, device)
    packed = ops.pack_linear(values)
    want = linear(x, packed, scale, None, BF16)
    x[2, 7], x[5:] = float("nan"), float("nan")
    for used in (5, 0):
        q, x_scale = quantize(x, used)
        assert torch.isnan(x_scale[:, used:]).all() and (q[used:].view(torch.uint8) == 0x7F).all()
        out = torch.full((capacity, 200), 7.0, dtype=BF16, device=device)
        ops.linear_fp8(x, packed, scale, None, rows(used, device), out)
        assert (out[used:] == 7).all()
        if used:
            assert torch.isnan(out[2].float()).all()
            assert_bits(out[[0, 1, 3, 4]], want[[0, 1, 3, 4]])


def test_sums_are_promoted_every_128(device):
    """Without it the tensor cores lose the small products beside a large one; here each block of 128 has its own size."""
    k = 2048
    x = torch.ones(4, k, device=device)
    x[:, :128] = 2.0**14
    values = torch.ones(64, k).to(FP8).to(device)
    got = linear(x, ops.pack_linear(values), torch.ones(1, 64, device=device), None, F32)
    assert_close(got, torch.full((4, 64), 128 * 2.0**14 + k - 128), 1e-7)


def test_bad_arguments_are_refused_by_name(device):
    x, (values, scale) = torch.randn(4, 144).to(BF16).to(device), weight(100, 144, False, device)
    q, x_scale = quantize(x)
    good = dict(x=x, weight=ops.pack_linear(values), weight_scale=scale, bias=None, num_rows=rows(4, device), out=torch.empty(4, 100, dtype=BF16, device=device))
    ops.linear_fp8(**good)
    for name, bad, message in [
        ("x", q, r"linear_fp8.*'x'"), ("weight", ops.pack_linear(values[:, :128].contiguous()), r"'weight'.*shape"),
        ("weight_scale", torch.ones(3, 100, device=device), r"'weight_scale'.*\[2, N\]"), ("bias", torch.ones(100, dtype=BF16, device=device), r"'bias'"),
        ("out", torch.empty(4, 99, dtype=BF16, device=device), r"shape")]:
        with pytest.raises(RuntimeError, match=message):
            ops.linear_fp8(**{**good, name: bad})
    with pytest.raises(RuntimeError, match="quantize_fp8.*'scale'.*shape"):
        ops.quantize_fp8(x, rows(4, device), q, x_scale[:, :4].contiguous())
