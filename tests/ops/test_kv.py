import pytest
import torch

from specrt import ops
from tests.kit.compare import assert_bits, assert_close, poisoned, rows

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def angles(positions: int, dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = 1.0 / 10000 ** (torch.arange(0, dim, 2).double() / dim)
    angle = torch.arange(positions).double()[:, None] * inverse
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotated(x: torch.Tensor, position: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [R, H, D] float64."""
    c, s = cos.double()[position.long()][:, None], sin.double()[position.long()][:, None]
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, page, norm", [(64, 16, False), (64, 64, True), (96, 32, True), (128, 64, False), (128, 16, True), (16, 16, True), (256, 32, True)])
@pytest.mark.parametrize("n", [9, 70])  # on CUDA fewer and more than a warp takes one head of
def test_rope_append_matches_float64(device, dtype, dim, page, norm, n):
    q_heads, kv_heads, pages = 6, 2, 5
    cos, sin = angles(1000, dim, device)
    qkv = torch.randn(n + 2, (q_heads + 2 * kv_heads) * dim).to(dtype).to(device)
    position = torch.randint(1000, (n + 2,), dtype=torch.int32).to(device)
    slot = torch.randperm(pages * page)[: n + 2].to(device)
    slot[4] = -1
    q_norm, k_norm = (torch.randn(dim).to(dtype).to(device) if norm else None for _ in range(2))
    q = poisoned(n + 2, q_heads, dim, dtype=dtype, device=device)
    k, v = (poisoned(pages, kv_heads, page, dim, dtype=dtype, device=device) for _ in range(2))
    ops.rope_append(qkv, position, slot, cos, sin, q_norm, k_norm, 1e-6, rows(n, device), q, k, v)

    q_in, k_in, v_in = qkv.view(n + 2, -1, dim).split([q_heads, kv_heads, kv_heads], 1)
    want_q, want_k = (rotated(normed(x, w) if norm else x.double(), position, cos, sin) for x, w in ((q_in, q_norm), (k_in, k_norm)))
    assert_close(q[:n], want_q[:n], TOLERANCE[dtype])
    assert torch.isnan(q[n:]).all()
    written = [r for r in range(n) if r != 4]
    at = slot[written]
    assert_close(k[at // page, :, at % page], want_k[written], TOLERANCE[dtype])
    assert_bits(v[at // page, :, at % page], v_in[written])
    untouched = torch.ones(pages, page, dtype=torch.bool, device=device)
    untouched[at // page, at % page] = False
    assert torch.isnan(k.transpose(1, 2)[untouched]).all() and torch.isnan(v.transpose(1, 2)[untouched]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
def test_fp8_pages_hold_the_quotient_of_what_wide_pages_hold(device, dtype, norm):
    n, dim, page, scales = 40, 64, 16, (0.0037, 0.011)
    cos, sin = angles(100, dim, device)
    qkv = (torch.randn(n, 6, dim) * 10.0 ** torch.randint(-4, 4, (n, 6, 1))).to(dtype)  # subnormals, and beyond 448
    qkv[3, 2, 5], qkv[3, 5, 7], qkv[4, 5, 1], qkv[4, 5, 2] = float("nan"), float("nan"), float("inf"), -float("inf")
    qkv = qkv.flatten(1).to(device)
    position, slot = torch.arange(n, dtype=torch.int32, device=device), torch.randperm(4 * page)[:n].to(device)
    position[7], slot[8] = -1, -1
    weight = torch.randn(dim).to(dtype).to(device) if norm else None
    found = []
    for kind, k_scale, v_scale in ((dtype, 1.0, 1.0), (ops.FP8, *scales)):
        q, k, v = poisoned(n, 2, dim, dtype=dtype, device=device), *(poisoned(4, 2, page, dim, dtype=kind, device=device) for _ in range(2))
        ops.rope_append(qkv, position, slot, cos, sin, weight, weight, 1e-6, rows(n, device), q, k, v, k_scale, v_scale)
        found.append((q, k.cpu(), v.cpu()))
    (q, *wide), (fp8_q, *narrow) = found
    assert_bits(fp8_q, q)
    for got, stored, scale in zip(narrow, wide, scales):
        want = (stored.float() / scale).clamp(-448, 448).to(ops.FP8)
        assert torch.equal(want.float().isnan(), got.float().isnan()) and want.float().isnan().any() and (want.float().abs() == 448).any()
        assert_bits(got.float().nan_to_num(0.0), want.float().nan_to_num(0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_append_matches_transformers(device, dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    n, heads, dim = 12, 3, 64
    cos, sin = angles(64, dim, device)
    qkv = torch.randn(n, 3 * heads * dim).to(dtype).to(device)
    position = torch.arange(n, dtype=torch.int32, device=device)
    q = poisoned(n, heads, dim, dtype=dtype, device=device)
    k, v = (poisoned(1, heads, 16, dim, dtype=dtype, device=device) for _ in range(2))
    ops.rope_append(qkv, position, position.long(), cos, sin, None, None, 0.0, rows(n, device), q, k, v)
    q_in, k_in, _ = qkv.view(1, n, 3, heads, dim).permute(2, 0, 3, 1, 4).float()
    full_cos, full_sin = (torch.cat([x[:n], x[:n]], -1)[None] for x in (cos, sin))
    want_q, want_k = apply_rotary_pos_emb(q_in, k_in, full_cos, full_sin)
    assert_close(q, want_q[0].transpose(0, 1), TOLERANCE[dtype])
    assert_close(k[0, :, :n], want_k[0], TOLERANCE[dtype])


def test_a_row_does_not_depend_on_the_others(device):
    n, dim = 70, 64
    cos, sin = angles(100, dim, device)
    qkv, weight = torch.randn(n, 5 * dim, device=device).bfloat16(), torch.randn(dim, device=device).bfloat16()
    position, slot = torch.arange(n, dtype=torch.int32, device=device), torch.arange(n, device=device)

    def run(picked):
        q = torch.empty(len(picked), 3, dim, dtype=torch.bfloat16, device=device)
        k, v = (torch.zeros(5, 1, 16, dim, dtype=torch.bfloat16, device=device) for _ in range(2))
        ops.rope_append(qkv[picked], position[picked], slot[picked], cos, sin, weight, weight, 1e-6, rows(len(picked), device), q, k, v)
        return q, k.reshape(-1, dim)

    q, k = run(list(range(n)))
    for r in (0, 17, 69):
        alone_q, alone_k = run([r])
        assert_bits(alone_q[0], q[r])
        assert_bits(alone_k[r], k[r])


def test_an_unknown_position_gives_nan(device):
    cos, sin = angles(10, 64, device)
    q = torch.zeros(3, 1, 64, device=device)
    k, v = (torch.zeros(1, 1, 16, 64, device=device) for _ in range(2))
    position, slot = torch.tensor([10, -1, 9], dtype=torch.int32, device=device), torch.tensor([0, 1, 2], device=device)
    ops.rope_append(torch.randn(3, 192, device=device), position, slot, cos, sin, None, None, 0.0, rows(3, device), q, k, v)
    assert torch.isnan(q[:2]).all() and torch.isfinite(q[2]).all()
    assert torch.isnan(k[0, 0, :2]).all() and torch.isfinite(k[0, 0, 2:]).all()


@pytest.mark.parametrize("dtype", [*DTYPES, ops.FP8])
@pytest.mark.parametrize("page", [16, 64])
def test_kv_commit_moves_the_path_and_nothing_else(device, dtype, page):
    layers, heads, dim, nodes, pages = 3, 2, 64, 64, 16
    table = torch.randperm(pages).int().view(4, 4)
    lens = torch.tensor([0, 13, 60, 30], dtype=torch.int32) if page == 64 else torch.tensor([0, 0, 0, 0], dtype=torch.int32)
    paths = [[0, 1, 5, 6, 40, 41, 63], [0], list(range(64)), [0, *range(2, 64)]]
    path_len = torch.tensor([7, 1, 64, 63], dtype=torch.int32)
    path = torch.full((4, nodes), -77777, dtype=torch.int32)
    for b, p in enumerate(paths):
        path[b, : len(p)] = torch.tensor(p, dtype=torch.int32)
    k, v = (torch.randn(layers, pages, heads, page, dim).to(dtype) for _ in range(2))
    want_k, want_v = k.clone(), v.clone()
    for b, p in enumerate(paths):
        for i, node in enumerate(p):
            to, source = int(lens[b]) + i, int(lens[b]) + node
            for want, old in ((want_k, k), (want_v, v)):
                want.view(torch.uint8)[:, table[b, to // page], :, to % page] = old.view(torch.uint8)[:, table[b, source // page], :, source % page]
    got_k, got_v = k.to(device), v.to(device)
    ops.kv_commit(got_k, got_v, table.to(device), lens.to(device), path.to(device), path_len.to(device))
    assert_bits(got_k, want_k)
    assert_bits(got_v, want_v)


def test_kv_commit_ignores_absent_requests(device):
    k, v = (torch.randn(1, 2, 1, 16, 64, device=device) for _ in range(2))
    before = k.clone(), v.clone()
    nonsense = torch.full((2, 8), -77777, dtype=torch.int32, device=device)
    ops.kv_commit(k, v, nonsense[:, :1].contiguous(), nonsense[:, 0].contiguous(), nonsense, torch.zeros(2, dtype=torch.int32, device=device))
    assert_bits(k, before[0])
    assert_bits(v, before[1])


@pytest.mark.parametrize("dtype, kv_dtype", [*zip(DTYPES, DTYPES), (torch.bfloat16, ops.FP8)])
def test_attention_after_the_commit_has_the_bits_of_the_tree_row(device, dtype, kv_dtype):
    prefix, dim, page = 250, 64, 16
    path = [0, 2, 3, 9, 17, 18]
    table = torch.randperm(20).int()[None].to(device)
    k, v = (torch.full((1, 20, 2, page, dim), float("nan"), dtype=dtype, device=device) for _ in range(2))
    slots = torch.arange(prefix + 20, device=device)
    ids = table[0].long()[slots // page]
    k[0, ids, :, slots % page] = torch.randn(prefix + 20, 2, dim).to(dtype).to(device)
    v[0, ids, :, slots % page] = torch.randn(prefix + 20, 2, dim).to(dtype).to(device)
    k, v = k.to(kv_dtype), v.to(kv_dtype)
    q = torch.randn(1, 4, dim).to(dtype).to(device)
    tree, plain = (poisoned(1, 4, dim, dtype=dtype, device=device) for _ in range(2))
    zero, workspace = torch.zeros(1, dtype=torch.int32, device=device), ops.attention_workspace(1, 4, dim, 20 * page, device)
    word = torch.tensor([sum(1 << n for n in path)], device=device)
    ops.attention_plan(zero, zero + prefix, word, None, rows(1, device), 1, 4, 2, table.shape[1] * page, kv_dtype == ops.FP8, workspace.plan)
    ops.tree_attention(q, k[0], v[0], table, zero, zero + prefix, word, None, 0.125, 0, rows(1, device), workspace.plan, workspace.partials, tree)
    ops.kv_commit(k, v, table, zero + prefix, torch.tensor([path], dtype=torch.int32, device=device), zero + len(path))
    ops.attention_plan(zero, zero + prefix + len(path), None, None, rows(1, device), 1, 4, 2, table.shape[1] * page, kv_dtype == ops.FP8, workspace.plan)
    ops.tree_attention(q, k[0], v[0], table, zero, zero + prefix + len(path), None, None, 0.125, 0, rows(1, device), workspace.plan, workspace.partials, plain)
    assert_bits(plain, tree)


def test_wrong_arguments_are_named(device):
    cos, sin = angles(10, 64, device)
    k, v = (torch.zeros(1, 1, 16, 64, device=device) for _ in range(2))
    q, one = torch.zeros(3, 1, 64, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"rope_append.*'qkv'.*\[3, 190\]"):
        ops.rope_append(torch.zeros(3, 190, device=device), one, one.long(), cos, sin, None, None, 0.0, rows(3, device), q, k, v)
    with pytest.raises(RuntimeError, match=r"rope_append.*'v_scale'.*only a float8_e4m3fn pool has a scale"):
        ops.rope_append(torch.zeros(3, 192, device=device), one, one.long(), cos, sin, None, None, 0.0, rows(3, device), q, k, v, 1.0, 0.5)
    with pytest.raises(RuntimeError, match=r"kv_commit.*'path_len'.*int64"):
        ops.kv_commit(k[None], v[None], one[None], one[:1].contiguous(), one[None], torch.zeros(1, dtype=torch.int64, device=device))
