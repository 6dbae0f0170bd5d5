import numpy as np
import pytest
import torch

from specrt import ops
from tests.kit.compare import assert_bits, assert_close, poisoned, rows

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 64, 576, 1000, 1001, 2049, 4096, 8200, 12288])
def test_rms_norm_matches_float64(device, dtype, hidden):
    x, w = torch.randn(5, hidden).to(dtype).to(device), torch.randn(hidden).to(dtype).to(device)
    want = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5) * w.double()
    out = poisoned(5, hidden, dtype=dtype, device=device)
    ops.rms_norm(x, w, 1e-5, rows(5, device), out)
    assert_close(out, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(device, dtype):
    x, w = torch.randn(33, 576).to(dtype).to(device), torch.randn(576).to(dtype).to(device)
    every, alone = torch.empty_like(x), torch.empty_like(x[:1])
    ops.rms_norm(x, w, 1e-5, rows(33, device), every)
    for r in (0, 7, 32):
        ops.rms_norm(x[r : r + 1].clone(), w, 1e-5, rows(1, device), alone)
        assert_bits(alone[0], every[r])


@pytest.mark.parametrize("hidden", [1, 576, 1001, 5000])
def test_rms_norm_sums_in_the_stated_order(device, hidden):
    """2048 lanes stride the row, then neighbours fold pairwise (csrc/README.md, 5). Squares of small integers times powers of two are exact: only the additions
    round, and their order shows."""
    x = (torch.randint(-64, 64, (3, hidden)) * 2.0 ** torch.randint(-9, 9, (3, hidden))).float()
    lane = torch.zeros(3, 2048)
    for i in range(0, hidden, 2048):
        part = x[:, i : i + 2048]
        lane[:, : part.shape[1]] += part * part
    while lane.shape[1] > 1:
        lane = lane[:, ::2] + lane[:, 1::2]
    r = torch.from_numpy(np.float32(1) / np.sqrt(lane.numpy() / np.float32(hidden) + np.float32(1e-5)))
    out = poisoned(3, hidden, dtype=torch.float32, device=device)
    ops.rms_norm(x.to(device), torch.ones(hidden, device=device), 1e-5, rows(3, device), out)
    assert_bits(out, x * r)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_begins_inside_16_bytes(device, dtype):
    """Views whose address is not a multiple of 16 give the bits of aligned ones."""
    at = lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)  # noqa: E731
    x, w = torch.randn(3, 576).to(dtype).to(device), torch.randn(576).to(dtype).to(device)
    shifted, aligned = at(torch.empty_like(x)), torch.empty_like(x)
    ops.rms_norm(at(x), at(w), 1e-5, rows(3, device), shifted)
    ops.rms_norm(x, w, 1e-5, rows(3, device), aligned)
    assert_bits(shifted, aligned)


def sums_of_squares(h: torch.Tensor) -> torch.Tensor:
    """float32 [R, blocks]: quads of columns chained, then folded pairwise (csrc/base/squares.h). Exact but for the additions where squares are exact."""
    quads = torch.nn.functional.pad(h.float(), (0, -h.shape[1] % 64)).view(len(h), -1, 16, 4) ** 2
    fold = ((quads[..., 0] + quads[..., 1]) + quads[..., 2]) + quads[..., 3]
    while fold.shape[-1] > 1:
        fold = fold[..., ::2] + fold[..., 1::2]
    return fold[..., 0]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 5, 66, 576, 1032, 4096, 9000])
def test_embedding_takes_rows_with_the_first_half_of_their_norm(device, dtype, hidden, early):
    """Unknown ids give NaN."""
    table = (torch.randint(-64, 64, (100, hidden)) * 2.0 ** torch.randint(-9, 9, (100, hidden))).to(dtype)
    w, blocks = torch.randn(hidden).to(dtype), -(-hidden // 64)
    ids = torch.tensor([3, 99, 100, -1, 0, 5], dtype=torch.int32, device=device)
    out, scaled = (poisoned(6, hidden, dtype=dtype, device=device) for _ in range(2))
    squares = poisoned(*ops.squares_shape(6, hidden), dtype=torch.float32, device=device)
    ops.embedding(table.to(device), ids, w.to(device), rows(5, device), out, scaled, squares, early)
    x = table[[3, 99, 0]]
    assert_bits(out[[0, 1, 4]], x)
    assert_bits(scaled[[0, 1, 4]], (x.float() * w.float()).to(dtype))
    assert_bits(squares[[0, 1, 4], :blocks], sums_of_squares(x))
    for t in (out, scaled, squares):
        assert torch.isnan(t[[2, 3, 5], :blocks].float()).all()


def test_rows_past_num_rows_are_untouched(device):
    x, w, out = torch.randn(4, 64, device=device), torch.ones(64, device=device), torch.full((4, 64), 7.0, device=device)
    ops.rms_norm(x, w, 1e-5, rows(2, device), out)
    assert (out[2:] == 7).all() and (out[:2] != 7).any()


def test_a_wrong_argument_is_named(device):
    x, w = torch.randn(4, 64, device=device), torch.ones(63, device=device)
    with pytest.raises(RuntimeError, match=r"rms_norm.*'weight'.*\[63\].*H = 64"):
        ops.rms_norm(x, w, 1e-5, rows(4, device), torch.empty_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 33, 576, 1001, 4096, 9000])
@pytest.mark.parametrize("normed", [(False, False), (True, True), (False, True), (True, False)])
@pytest.mark.parametrize("feature_first,stream_normed", [(False, False), (True, True), (False, None)])
def test_a_heads_input_is_embedding_and_norms_side_by_side(device, dtype, hidden, normed, feature_first, stream_normed):
    """With parents, repeated and out of order, and without; ids and parents that are outside give NaN, in their half alone."""
    table, features, w = torch.randn(11, hidden), torch.randn(9, hidden), torch.randn(2, hidden)
    table, features, w = (t.to(dtype).to(device) for t in (table, features, w))
    ids = torch.tensor([3, 10, 11, 0, -1, 3, 7, 2, 2], dtype=torch.int32, device=device)
    n = rows(8, device)

    def norm(x, weight, wanted):
        out = torch.empty_like(x)
        ops.rms_norm(x, weight, 1e-5, rows(len(x), device), out)
        return out if wanted else x

    for parent in (None, torch.tensor([8, 8, 0, 9, 1, 7, 3, -1, 0], dtype=torch.int32, device=device)):
        unknown = ((ids < 0) | (ids > 10))[:, None]
        embedded = table[ids.long().clamp(0, 10)].masked_fill(unknown, float("nan"))
        gone = torch.zeros(9, 1, dtype=torch.bool, device=device) if parent is None else ((parent < 0) | (parent > 8))[:, None]
        feature = (features if parent is None else features[parent.long().clamp(0, 8)].contiguous()).masked_fill(gone, float("nan"))
        halves = [norm(embedded, w[0], normed[0]), norm(feature, w[1], normed[1])]
        joined = poisoned(9, 2 * hidden, dtype=dtype, device=device)
        stream = None if stream_normed is None else poisoned(9, hidden, dtype=dtype, device=device)
        ops.head_input(table, ids, features, parent, w[0] if normed[0] else None, w[1] if normed[1] else None, 1e-5, feature_first, n, joined, stream, bool(stream_normed),
                       early=parent is not None)
        want = torch.cat(halves[::-1] if feature_first else halves, dim=1)
        assert torch.equal(joined[:8].nan_to_num(nan=77.0), want[:8].nan_to_num(nan=77.0)) and torch.isnan(joined[8]).all()
        if stream is not None:
            assert torch.equal(stream[:8].nan_to_num(nan=77.0), (halves[1] if stream_normed else feature)[:8].nan_to_num(nan=77.0)) and torch.isnan(stream[8]).all()


def test_a_heads_input_names_a_wrong_argument(device):
    make = lambda *shape: torch.zeros(*shape, device=device)  # noqa: E731
    ids = torch.zeros(3, dtype=torch.int32, device=device)
    for feature, joined, name in [(make(4, 8), make(3, 16), "feature"), (make(3, 8), make(3, 8), "joined")]:
        with pytest.raises(RuntimeError, match=f"head_input.*'{name}'"):
            ops.head_input(make(5, 8), ids, feature, None, None, None, 1e-5, False, rows(3, device), joined, None, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden,count", [(1, 1), (33, 3), (576, 2), (4096, 3), (9000, 1)])
@pytest.mark.parametrize("normed", [False, True])
def test_joined_rows_are_gathered_and_normed(device, dtype, hidden, count, normed):
    """Sources repeated and out of order, one that is missing, one that is outside; and none: each row's own."""
    parts = [torch.randn(9, hidden).to(dtype).to(device) for _ in range(count)]
    weights = [torch.randn(hidden).to(dtype).to(device) for _ in range(count)]
    missing = torch.randn(count * hidden).to(dtype).to(device)

    def norm(x, weight):
        out = torch.empty_like(x)
        ops.rms_norm(x.contiguous(), weight, 1e-5, rows(len(x), device), out)
        return out if normed else x

    for source in (None, [8, 0, 3, 3, -1, 9, 1, 2, 0]):
        index = torch.arange(9) if source is None else torch.tensor(source)
        want = []
        for part, (x, w) in enumerate(zip(parts, weights)):
            x = x[index.clamp(0, 8)].clone()
            x[index == -1] = missing[part * hidden : (part + 1) * hidden]
            x[index == 9] = float("nan")
            want.append(norm(x, w))
        out = poisoned(9, count * hidden, dtype=dtype, device=device)
        ops.join_rows(parts, weights if normed else [], None if source is None else index.int().to(device), missing, 1e-5, rows(8, device), out)
        assert torch.equal(out[:8].nan_to_num(nan=77.0), torch.cat(want, 1)[:8].nan_to_num(nan=77.0)) and torch.isnan(out[8]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 33, 4096, 9000])
@pytest.mark.parametrize("normed,stream_normed", [(False, False), (True, False), (True, True), (True, None)])
def test_rows_are_kept_where_they_are_wanted(device, dtype, hidden, normed, stream_normed):
    x, weight = torch.randn(7, hidden).to(dtype).to(device), torch.randn(hidden).to(dtype).to(device)
    norm = x.clone()
    if normed:
        ops.rms_norm(x, weight, 1e-5, rows(7, device), norm)
    place = torch.tensor([2, -1, 0, 4, 5, 3, 1], dtype=torch.int32, device=device)
    kept, stream = (poisoned(5, hidden, dtype=dtype, device=device) for _ in range(2))
    ops.keep_rows(x, weight if normed else None, 1e-5, place, rows(6, device), kept, None if stream_normed is None else stream, bool(stream_normed))
    for out, want in [(kept, norm), (stream, norm if stream_normed else x)]:
        if stream_normed is not None or out is kept:
            assert torch.equal(out[[2, 0, 4, 3]], want[[0, 2, 3, 5]])
            assert torch.isnan(out[1]).all()


def test_joined_and_kept_rows_name_a_wrong_argument(device):
    x, n = torch.zeros(3, 8, device=device), rows(3, device)
    with pytest.raises(RuntimeError, match="join_rows.*'parts'"):
        ops.join_rows([], [], None, None, 1e-5, n, x)
    with pytest.raises(RuntimeError, match="join_rows.*'weights'"):
        ops.join_rows([x, x], [torch.ones(8, device=device)], None, None, 1e-5, n, torch.zeros(3, 16, device=device))
    with pytest.raises(RuntimeError, match="join_rows.*'out'"):
        ops.join_rows([x, x], [], None, None, 1e-5, n, torch.zeros(3, 8, device=device))
    with pytest.raises(RuntimeError, match="keep_rows.*'place'"):
        ops.keep_rows(x, None, 1e-5, torch.zeros(3, dtype=torch.int64, device=device), n, torch.zeros(2, 8, device=device), None, False)
