"""Every op once or twice at small odd shapes: what compute-sanitizer runs, which makes everything 10 to 50 times slower.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python bench/sanitize_ops.py

Without the caching allocator every tensor is an allocation of its own, so that an access past its end is seen. Each kernel variant is reached: the
linears of every row count, narrow and wide, and each way their sums end; attention with ancestors, with paths and with neither, windows, empty rows; fewer rows in use than there are.
Results are checked for NaN in the rows in use, and for the poison in the others; their values are the tests' business. `--device cpu` runs the same calls there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from specrt import ops  # noqa: E402

F32, BF16, I32, I64, U8 = torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8
POISON = -77777


class Kit:
    """Inputs and poisoned outputs on one device."""

    def __init__(self, device: str):
        self.device, self.cuda = device, torch.device(device).type == "cuda"
        self.generator = torch.Generator().manual_seed(5)

    def random(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(device=self.device, dtype=dtype)

    def ints(self, *values, dtype: torch.dtype = I32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def full(self, *shape: int, value: float, dtype: torch.dtype = I32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def out(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return self.full(*shape, value=POISON, dtype=dtype)

    def written(self, out: Tensor, rows: int) -> None:
        poison = torch.tensor(POISON).to(out.dtype)
        used, rest = out[:rows].cpu(), out[rows:].cpu()
        assert not torch.isnan(used.float()).any() and not (used == poison).any(), "a row in use has NaN, or was not written"
        assert (rest == poison).all(), "a row past num_rows was written"


def linears(k: Kit) -> None:
    cuda = k.cuda
    # capacity, rows in use, K, N. CUDA: 48 outputs are narrow clusters, 4000 wide ones, 18000 one range of K and more tiles than CTAs, 5648 the ranges in turn; 22 steps of K wrap every pipeline.
    few = [(rows, used, *shape) for rows, used in [(1, 1), (16, 13), (51, 43), (130, 77)] for shape in [(1352, 48), (1352, 4000 if cuda else 208), (72, 18000 if cuda else 208)]]
    many = [(230, 200, 72, 18000 if cuda else 208), (260, 257, 1352, 48), (300, 290, 1352, 5648 if cuda else 208), (700, 300, 80, 5760 if cuda else 208), (700, 690, 80, 5760 if cuda else 208)]
    # The last two: blocks without rows; blocks all in use, whose clusters of two CTAs have several tiles.
    for rows, used, depth, outputs in [*few, *many]:
        x, weight, bias = (k.random(*shape, dtype=BF16) for shape in [(rows, depth), (outputs, depth), (outputs,)])
        packed = ops.pack_linear(weight)
        for dtype, b in [(BF16, bias), (F32, None)]:
            out = k.out(rows, outputs, dtype=dtype)
            ops.linear(x, packed, b, k.ints(used), out)
            k.written(out, used)
        finishes(k, (x, packed, bias), rows, used, outputs, BF16)
    for rows, used in [(7, 5), (70, 66)]:
        x, weight, bias, out = k.random(rows, 35), k.random(67, 35), k.random(67), k.out(rows, 67)
        ops.linear(x, ops.pack_linear(weight), bias, k.ints(used), out)
        k.written(out, used)
        finishes(k, (x, ops.pack_linear(k.random(48, 35)), k.random(48)), rows, used, 48, F32)


def choices(k: Kit) -> None:
    """lm_head that chooses the tokens."""
    shapes = [(1, 1, 1352, 48), (16, 13, 1352, 4000), (30, 29, 72, 18000), (51, 43, 1352, 4000), (130, 77, 72, 18000), (130, 127, 1352, 1000), (200, 190, 72, 18000), (260, 257, 72, 18000)]
    for rows, used, depth, outputs in shapes:
        for dtype in (BF16, F32):
            x, weight = k.random(rows, depth, dtype=dtype), k.random(outputs if k.cuda else 208, depth, dtype=dtype)
            request, temperature = torch.arange(rows, dtype=I32, device=k.device) % 2, k.full(2, 6, value=0.0, dtype=F32)
            temperature[1] = 0.8
            for logprob in (None, k.out(rows)):
                token, status = k.out(rows, dtype=I32), k.out(rows, dtype=I32)
                ops.linear_sample(x, ops.pack_linear(weight), len(weight), k.ints(used), request, request, k.ints(3, 4, dtype=I64), temperature, token, status, logprob)
                for out in (token, status) if logprob is None else (token, status, logprob):
                    k.written(out, used)


def fp8_linears(k: Kit) -> None:
    cuda = k.cuda
    few = [(rows, used, *shape) for rows, used in [(1, 1), (4, 3), (16, 13)] for shape in [(1360, 48, False), (1360, 4000 if cuda else 208, True), (80, 18000 if cuda else 208, False)]]
    many = [(51, 43, 1360, 4000 if cuda else 208, True), (130, 77, 80, 18000 if cuda else 208, False), (700, 300, 80, 5760 if cuda else 208, False),
            (700, 690, 80, 5760 if cuda else 208, False)]
    for rows, used, depth, outputs, blocks in [*few, *many]:
        weight = ops.pack_linear(k.random(outputs, depth).to(ops.FP8)), k.random((depth + 127) // 128 if blocks else 1, outputs), k.random(outputs)
        for dtype in (BF16, F32):
            x, out = k.random(rows, depth, dtype=dtype), k.out(rows, outputs, dtype=dtype)
            ops.linear_fp8(x, *weight, k.ints(used), out)
            k.written(out, used)
            q, scale = k.out(rows, depth).to(ops.FP8), k.out(*ops.fp8_scale_shape(rows, depth))
            ops.quantize_fp8(x, k.ints(used), q, scale)
            assert (scale[:, :used] != POISON).all()
            finishes(k, (x, *weight), rows, used, outputs, dtype)


def finishes(k: Kit, product: tuple[Tensor, ...], rows: int, used: int, outputs: int, dtype: torch.dtype) -> None:
    """What linear does to its sums besides storing them: a norm that was deferred, SiLU-mul, the residual add with and without the next norm."""
    fp8, n, depth = product[1].dtype == ops.FP8, k.ints(used), product[0].shape[1]
    squares = k.random(*ops.squares_shape(rows, depth)).abs() * 1e5  # far from the poison: sums of about 1
    out = k.out(rows, outputs // 2, dtype=dtype)
    if fp8:
        ops.linear_fp8_silu(*product, n, out, squares, 1e-5)
    else:
        ops.linear_silu(*product, n, out, squares, 1e-5)
    k.written(out, used)
    for weight in (k.random(outputs, dtype=dtype), None):
        new, scaled, sums = k.out(rows, outputs, dtype=dtype), k.out(rows, outputs, dtype=dtype), k.out(*ops.squares_shape(rows, outputs))
        residual, next_norm = k.random(rows, outputs, dtype=dtype), (weight, scaled, sums) if weight is not None else ()
        if fp8:
            ops.linear_fp8_residual(*product, n, residual, new, *next_norm)
        else:
            ops.linear_residual(*product, n, residual, new, *next_norm)
        k.written(new, used)
        if weight is not None:
            k.written(scaled, used)
            k.written(sums[:, : (outputs + 63) // 64], used)


def row_wise(k: Kit) -> None:
    for dtype in (BF16, F32):
        for rows, used, hidden in [(5, 3, 72), (9, 9, 33), (3, 0, 8)]:
            n = k.ints(used)
            out = k.out(rows, hidden, dtype=dtype)
            ops.rms_norm(k.random(rows, hidden, dtype=dtype), k.random(hidden, dtype=dtype), 1e-5, n, out)
            k.written(out, used)
            out, scaled = k.out(rows, hidden, dtype=dtype), k.out(rows, hidden, dtype=dtype)
            ids = torch.arange(rows, dtype=I32, device=k.device)
            ops.embedding(k.random(11, hidden, dtype=dtype), ids, k.random(hidden, dtype=dtype), n, out, scaled, k.out(*ops.squares_shape(rows, hidden), dtype=F32))
            k.written(out, used)
            k.written(scaled, used)
            for weight in (None, k.random(hidden, dtype=dtype)):
                joined, stream = k.out(rows, 2 * hidden, dtype=dtype), k.out(rows, hidden, dtype=dtype)
                ops.head_input(k.random(11, hidden, dtype=dtype), ids, k.random(rows + 2, hidden, dtype=dtype), ids + 2, weight, weight, 1e-5, False, n, joined, stream, False)
                k.written(joined, used)
                k.written(stream, used)
            parts, joined = [k.random(rows + 2, hidden, dtype=dtype) for _ in range(3)], k.out(rows, 3 * hidden, dtype=dtype)
            ops.join_rows(parts, [k.random(hidden, dtype=dtype) for _ in range(3)], ids - 1, k.random(3 * hidden, dtype=dtype), 1e-5, n, joined)
            k.written(joined, used)
            kept, stream = k.out(rows, hidden, dtype=dtype), k.out(rows, hidden, dtype=dtype)
            ops.keep_rows(k.random(rows, hidden, dtype=dtype), k.random(hidden, dtype=dtype), 1e-5, ids, n, kept, stream, False)
            k.written(kept, used)
            k.written(stream, used)


def paged(k: Kit) -> None:
    heads = [(64, 4, 2, 16), (96, 3, 3, 32), (128, 16, 1, 64)]
    for dtype in (BF16, F32):
        for dim, q_heads, kv_heads, page in heads:
            lengths = [0, 15, 64, 281, 2100 if dim == 64 else 130]  # of the requests: empty, inside a page, a tile, two chunks, two groups
            per = max(lengths) // page + 7
            pages = len(lengths) * per
            table = torch.randperm(pages, generator=k.generator).view(len(lengths), per).to(device=k.device, dtype=I32)
            wide = [k.random(2, pages, kv_heads, page, dim, dtype=dtype) for _ in range(2)]
            for pools in (wide, [pool.to(ops.FP8) for pool in wide]):
                rope(k, dim, q_heads, kv_heads, page, pools, dtype)
                trees(k, dim, q_heads, lengths, table, page, pools, dtype)
                prompts(k, dim, q_heads, lengths, table, pools, dtype)


def rope(k: Kit, dim: int, q_heads: int, kv_heads: int, page: int, pools: list[Tensor], dtype: torch.dtype) -> None:
    rows, used = 5, 4
    slots = k.ints(3, -1, page, 2 * page - 1, 0, dtype=I64)
    cos, sin = k.random(40, dim // 2), k.random(40, dim // 2)
    for norm in (None, k.random(dim, dtype=dtype)):
        q = k.out(rows, q_heads, dim, dtype=dtype)
        ops.rope_append(k.random(rows, (q_heads + 2 * kv_heads) * dim, dtype=dtype), k.ints(0, 1, 39, 7, 3), slots, cos, sin, norm, norm, 1e-5, k.ints(used), q,
                        pools[0][0], pools[1][0])
        k.written(q, used)


def trees(k: Kit, dim: int, q_heads: int, lengths: list[int], table: Tensor, page: int, pools: list[Tensor], dtype: torch.dtype) -> None:
    """tree_build, verify attention on its rows, the commit of a path, and draft attention with path lists beyond 64 slots."""
    slots, nodes, capacity = len(lengths), 9, 44
    parent = k.ints(-1, 0, 0, 1, 3, 2, 3, 4, 7).repeat(slots, 1)
    token = torch.arange(slots * nodes, dtype=I32, device=k.device).view(slots, nodes)
    size, seq_lens = k.ints(9, 1, 0, 9, 7), k.ints(*lengths)
    used = 26
    i32 = [k.out(capacity, dtype=I32) for _ in range(5)]
    request, node, row_token, position, prefix = i32
    slot, ancestors, num_rows = k.out(capacity, dtype=I64), k.out(capacity, dtype=I64), k.out(1, dtype=I32)
    ops.tree_build(token, parent, k.full(slots, value=1), size, seq_lens, table, page, k.out(slots, nodes, dtype=I32), k.out(slots, nodes, dtype=I64), k.out(slots + 1, dtype=I32),
                   request, node, row_token, position, prefix, slot, ancestors, num_rows)
    assert num_rows.item() == used
    for t in (*i32, slot, ancestors):
        k.written(t, used)
    workspace = ops.attention_workspace(capacity, q_heads, dim, table.shape[1] * page, k.device)
    level = torch.arange(capacity, dtype=I32, device=k.device) % 3
    paths = torch.stack([level, torch.where(level > 0, 70 + level, -1), k.full(capacity, value=-1)], 1).contiguous()
    chains = (2 << node.clamp(min=0).long()) - 1
    # All rows, and then so few that each has CTAs of its own (no more than there are requests): several of one request among them.
    for rows, requests, n in ((capacity, table, used), (2 * slots, table.repeat(2, 1), 2 * slots - 3)):
        for words, lists in [(ancestors[:rows], None), (chains[:rows], None), (None, paths[:rows]), (None, None)]:
            few = request[:rows], prefix[:rows], words, lists
            ops.attention_plan(*few, k.ints(n), len(requests), q_heads, pools[0].shape[2], table.shape[1] * page, pools[0].dtype == ops.FP8, workspace.plan)
            # Without paths a row sees its prefix only; a row of prefix 0 sees nothing and gives zeros.
            for window in (0, 20):
                out = k.out(rows, q_heads, dim, dtype=dtype)
                ops.tree_attention(k.random(rows, q_heads, dim, dtype=dtype), pools[0][1], pools[1][1], requests, *few, 0.2, window, k.ints(n), workspace.plan, workspace.partials, out)
                k.written(out, n)
    path = k.ints(0, 1, 3, 4, 7, 0, 0, 0, 0).repeat(slots, 1)
    ops.kv_commit(pools[0], pools[1], table, seq_lens, path, k.ints(5, 1, 0, 5, 4))


def prompts(k: Kit, dim: int, q_heads: int, lengths: list[int], table: Tensor, pools: list[Tensor], dtype: torch.dtype) -> None:
    """span_rows, and prompt attention on them: several requests in one block of 64 rows."""
    slots, capacity = len(lengths), 100
    start, end = k.ints(0, 3, 60, 270, 100), k.ints(0, 15, 64, 281, 130)
    used = 12 + 4 + 11 + 30
    request, token, position, prefix = (k.out(capacity, dtype=I32) for _ in range(4))
    slot, num_rows = k.out(capacity, dtype=I64), k.out(1, dtype=I32)
    page = pools[0].shape[3]
    ops.span_rows(k.full(slots, 300, value=3), start, end, table, page, k.out(slots + 1, dtype=I32), request, token, position, prefix, slot, num_rows)
    assert num_rows.item() == used
    for t in (request, token, position, prefix, slot):
        k.written(t, used)
    for window in (0, 33):
        out = k.out(capacity, q_heads, dim, dtype=dtype)
        ops.prefill_attention(k.random(capacity, q_heads, dim, dtype=dtype), pools[0][1], pools[1][1], table, request, prefix, 0.2, window, num_rows, out)
        k.written(out, used)


def sampling(k: Kit) -> None:
    """The whole sampler on two trees and a plain row, then every way to accept, at a small vocabulary and one whose top-p set does not fit the shared list."""
    for vocab in (131, 5003):
        slots, nodes, capacity, used = 3, 4, 12, 9
        request, node = k.ints(0, 0, 0, 0, 1, 2, 2, 2, 2, 0, 0, 0), k.ints(0, 1, 2, 3, 0, 0, 1, 2, 3, 0, 0, 0)
        token = (torch.arange(slots * nodes, dtype=I32, device=k.device) * 7 % vocab).view(slots, nodes)
        parent, size, offset = k.ints(-1, 0, 0, 1).repeat(slots, 1), k.ints(4, 1, 4), k.ints(0, 4, 5, 9)
        ancestors = k.ints(1, 3, 5, 11, dtype=I64).repeat(slots, 1)
        seq_lens, seeds, n = k.ints(5, 9, 30), k.ints(1, -2, 1 << 40, dtype=I64), k.ints(used)
        position = seq_lens[request.long()] + k.ints(0, 1, 1, 2)[node.long()]
        sampling_f = k.ints([0.7, 0.9, 0.01, 1.2, 0.1, 0.1], [0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [1.0, 0.95, 0.0, 1.0, 0.0, 0.0], dtype=F32)
        sampling_i = k.ints([vocab // 2, 40, 2, 1, 1], [0, 0, 2, 0, 0], [0, 0, 2, 0, 0])
        z, status = k.random(capacity, vocab), k.out(capacity, dtype=I32)
        bits = k.full(2, (vocab + 31) // 32, value=0x55555555)
        row_mask = k.ints(-1, 0, 1, -1, -1, -1, 0, -1, -1, -1, -1, -1)
        ops.sample_transform(z, request, position, node, token, ancestors, sampling_f, sampling_i, k.ints([1, -1], [2, 3], [-1, -1]), k.random(slots, vocab),
                             k.full(slots, vocab, value=1), k.full(slots, vocab, value=1, dtype=U8), bits, row_mask, n, status)
        k.written(status, used)
        assert not status[:used].any()
        target = k.out(capacity, dtype=I32)
        ops.sample_exact(z, request, position, seeds, sampling_f, n, target)
        k.written(target, used)
        lse, chosen, top_token, top = k.out(capacity), k.out(capacity), k.out(capacity, 5, dtype=I32), k.out(capacity, 5)
        ops.row_logprobs(z, target, n, lse, chosen, top_token, top)
        for t in (lse, chosen, top_token, top):
            k.written(t, used)
        for noise in (-1, ops.NOISE_DRAFT):
            child, score = k.out(capacity, 3, dtype=I32), k.out(capacity, 3)
            ops.draft_topk(z, request, position, seeds, sampling_f, noise, n, k.out(capacity, vocab), child, score)
            k.written(child, used)
            k.written(score, used)

        # Of 130 tokens or one that the drafter has, and of all; the second slot's stops are in force.
        for ids in (torch.arange(130, dtype=I64, device=k.device) * (vocab // 131), k.ints(vocab - 1, dtype=I64), None):
            child, score = k.out(capacity, 3, dtype=I32), k.out(capacity, 3)
            ops.draft_children(k.random(capacity, vocab if ids is None else len(ids)), 0, 0, ids, request, position, 2, sampling_f, sampling_i, k.ints([1, -1], [2, 3], [-1, -1]),
                               k.random(slots, vocab), seeds, ops.NOISE_SHARED, True, n, child, score)
            k.written(child, used)
            k.written(score, used)

        path, emitted, path_len, error = k.out(slots, nodes, dtype=I32), k.out(slots, nodes, dtype=I32), k.out(slots, dtype=I32), k.out(slots, dtype=I32)
        walked = (path, path_len, emitted, error)
        ops.accept_walk(token, parent, size, offset, target, status, *walked)
        ops.accept_synthetic(token, parent, size, offset, target, status, seq_lens, seeds, 1.5, *walked)
        q, scratch = k.random(slots, 2, vocab), k.out(slots, 2, vocab)
        for levels in (k.ints(2, 0, 2), k.ints(0, 0, 0)):
            ops.accept_rejection(z, status, offset, token, parent, size, seq_lens, q, levels, seeds, sampling_f, scratch, *walked)
            k.written(path_len, slots)
            assert not error.any() and (path_len > 0).all()
        ops.round_advance(path_len, emitted, k.full(slots, value=99), seq_lens, k.full(slots, 33, value=0), k.full(slots, vocab, value=0), k.full(slots, value=1), token)


def drafting(k: Kit) -> None:
    """N-gram lookup as chain and tree; three levels of an expansion and its re-ranking."""
    slots, nodes = 3, 64
    history = (torch.arange(5000, dtype=I32, device=k.device) % 7).repeat(slots, 1)
    history[1] = torch.arange(5000, dtype=I32, device=k.device)
    seq_lens, seeds = k.ints(4999, 30, 0), k.ints(1, 2, 3, dtype=I64)
    sampling_f = k.ints([1.0, 1, 0, 1, 0, 0], [0.0, 1, 0, 1, 0, 0], [0.0, 1, 0, 1, 0, 0], dtype=F32)
    for branches in (1, 4):
        size = k.out(slots, dtype=I32)
        ops.ngram_propose(history, seq_lens, k.ints(63, 5, 9), k.ints(40, 5, 9), 1, 3, branches, seeds, sampling_f, k.out(slots, nodes, dtype=I32),
                          k.out(slots, nodes, dtype=I32), size)
        k.written(size, slots)

    width, levels, page = 10, 3, 16
    candidates, rows = width + (levels - 1) * width * width, slots * width
    table = torch.arange(slots * 4, dtype=I32, device=k.device).view(slots, 4)
    token, parent, score = (k.out(slots, candidates, dtype=t) for t in (I32, I32, F32))
    beam, num_rows = k.full(slots, width, value=0), k.out(1, dtype=I32)
    request, row_token, position, prefix, above = (k.out(rows, dtype=I32) for _ in range(5))
    slot, path = k.out(rows, dtype=I64), k.out(rows, levels, dtype=I32)
    lengths, depth = k.ints(3, 17, 0), k.ints(3, 1, 2)
    for level in range(1, levels + 1):
        given = slots if level == 1 else rows
        ops.tree_expand(level, width, k.full(given, width, value=level), -k.random(given, width).abs(), depth, lengths, table, page, token, parent, score, beam, request,
                        row_token, position, prefix, slot, path, above, num_rows)
    limits = [k.out(slots, dtype=I32) for _ in range(3)]
    ops.draft_limits(k.ints(7, 0, 3), k.ints(4, 4, 4), k.ints(9, 17, 4), k.ints(1, 1, 0), 1, *limits)
    assert [t.tolist() for t in limits] == [[7, 0, 0], [4, 0, 0], [8, 16, 3]]
    num_rows, capacity = k.out(1, dtype=I32), 20
    rows_of = [k.out(capacity, dtype=t) for t in (I32, I32, I32, I32, I64, I32, I32)]
    ops.path_rows(history, k.ints(9, 17, 4), k.ints(8, 1, 3), k.ints(7, 7, 0), k.ints(3, 1, 3), 3, 1, k.ints(*range(8)).repeat(slots, 1), k.ints(0, 8, 9, 12), table, page,
                  *rows_of, num_rows)
    assert num_rows.item() == 8 + 2 + 1
    for t in rows_of:
        k.written(t, 11)
    size = k.out(slots, dtype=I32)
    ops.tree_select(levels, width, width, k.ints(63, 5, 9), depth, token, parent, score, k.out(slots, nodes, dtype=I32), k.out(slots, nodes, dtype=I32), size)
    assert size.tolist() == [64, 6, 10]


PARTS = (linears, choices, fp8_linears, row_wise, paged, sampling, drafting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", choices=[part.__name__ for part in PARTS], help="only this one: racecheck takes minutes, and several processes share the time")
    args = parser.parse_args()
    kit = Kit(args.device)
    for part in PARTS:
        if args.part in (None, part.__name__):
            part(kit)
            print(part.__name__, "passed", flush=True)


if __name__ == "__main__":
    main()
