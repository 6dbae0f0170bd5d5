import pytest
import torch

from specrt import ops
from tests.kit.compare import assert_bits, assert_close, poisoned, rows

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 576, 1000, 4096])
def test_rms_norm_matches_float64(device, dtype, hidden):
    x, w = torch.randn(5, hidden).to(dtype).to(device), torch.randn(hidden).to(dtype).to(device)
    residual = torch.randn(5, hidden).to(dtype).to(device)
    h = (residual.float() + x.float()).to(dtype)
    want = h.double() * torch.rsqrt(h.double().pow(2).mean(-1, keepdim=True) + 1e-5) * w.double()
    out = poisoned(5, hidden, dtype=dtype, device=device)
    ops.rms_norm(x, residual, w, 1e-5, rows(5, device), out)
    assert_bits(residual, h)
    assert_close(out, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(device, dtype):
    x, w = torch.randn(33, 576).to(dtype).to(device), torch.randn(576).to(dtype).to(device)
    every, alone = torch.empty_like(x), torch.empty_like(x[:1])
    ops.rms_norm(x, None, w, 1e-5, rows(33, device), every)
    for r in (0, 7, 32):
        ops.rms_norm(x[r : r + 1].clone(), None, w, 1e-5, rows(1, device), alone)
        assert_bits(alone[0], every[r])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_matches_float64(device, dtype):
    x = (4 * torch.randn(7, 2 * 1536)).to(dtype).to(device)
    out = poisoned(7, 1536, dtype=dtype, device=device)
    ops.silu_mul(x, rows(7, device), out)
    gate, up = x.double().chunk(2, -1)
    assert_close(out, torch.nn.functional.silu(gate) * up, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_takes_rows_and_marks_unknown_ids(device, dtype):
    table = torch.randn(100, 48).to(dtype).to(device)
    ids = torch.tensor([3, 99, 100, -1, 0], dtype=torch.int32, device=device)
    out = poisoned(5, 48, dtype=dtype, device=device)
    ops.embedding(table, ids, rows(5, device), out)
    assert_bits(out[[0, 1, 4]], table[[3, 99, 0]])
    assert torch.isnan(out[[2, 3]].float()).all()


def test_rows_past_num_rows_are_untouched(device):
    x, w, out = torch.randn(4, 64, device=device), torch.ones(64, device=device), torch.full((4, 64), 7.0, device=device)
    ops.rms_norm(x, None, w, 1e-5, rows(2, device), out)
    assert (out[2:] == 7).all() and (out[:2] != 7).any()


def test_a_wrong_argument_is_named(device):
    x, w = torch.randn(4, 64, device=device), torch.ones(63, device=device)
    with pytest.raises(RuntimeError, match=r"rms_norm.*'weight'.*\[63\].*H = 64"):
        ops.rms_norm(x, None, w, 1e-5, rows(4, device), torch.empty_like(x))
