import random

import pytest
import torch

from specrt import ops
from tests.kit.compare import poisoned
from tests.ops.tree_cases import POISON, ints, random_table, random_trees, slot_of

I32, I64 = torch.int32, torch.int64


def build(device, token, parent, size, seq_lens, table, page_size, capacity, idle=()):
    """Every output of tree_build, as nested lists. idle: slots that are not active, whatever their trees' sizes."""
    batch, nodes = len(token), len(token[0])
    shapes = dict(tree_depth=((batch, nodes), I32), tree_ancestors=((batch, nodes), I64), row_offset=((batch + 1,), I32), row_request=((capacity,), I32),
                  row_node=((capacity,), I32), row_token=((capacity,), I32), row_position=((capacity,), I32), row_prefix=((capacity,), I32),
                  row_slot=((capacity,), I64), row_ancestors=((capacity,), I64), num_rows=((1,), I32))
    out = {name: poisoned(*shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    active, sizes = ints([b not in idle for b in range(batch)], device), ints(size, device)
    ops.tree_build(ints(token, device), ints(parent, device), active, sizes, ints(seq_lens, device), ints(table, device), page_size, *out.values())
    assert sizes.tolist() == [0 if b in idle else n for b, n in enumerate(size)]
    return {name: t.tolist() for name, t in out.items()}


def signed(word):
    return word - (1 << 64) if word >> 63 else word


def expected(token, parent, size, seq_lens, table, page_size, capacity):
    batch, nodes = len(token), len(token[0])
    want = dict(tree_depth=[[POISON] * nodes for _ in token], tree_ancestors=[[POISON] * nodes for _ in token], row_offset=[])
    rows = []
    for b in range(batch):
        want["row_offset"].append(min(len(rows), capacity))
        for node in range(size[b]):
            path, up = [], node
            while up >= 0:
                path.append(up)
                up = parent[b][up]
            word = signed(sum(1 << n for n in path))
            want["tree_depth"][b][node], want["tree_ancestors"][b][node] = len(path) - 1, word
            rows.append((b, node, token[b][node], seq_lens[b] + len(path) - 1, seq_lens[b], slot_of(table[b], page_size, seq_lens[b] + node), word))
    rows = rows[:capacity]
    want["row_offset"].append(len(rows))
    for i, name in enumerate(["row_request", "row_node", "row_token", "row_position", "row_prefix", "row_slot", "row_ancestors"]):
        want[name] = [r[i] for r in rows] + [POISON] * (capacity - len(rows))
    want["num_rows"] = [len(rows)]
    return want


@pytest.mark.parametrize("batch,nodes,page_size", [(1, 1, 16), (1, 64, 16), (3, 33, 32), (8, 64, 64), (70, 7, 16)])
def test_tree_build_equals_brute_force(device, batch, nodes, page_size):
    rng = random.Random(batch * 100 + nodes)
    for _ in range(4):
        token, parent, size = random_trees(rng, batch, nodes, vocab=50)
        table = random_table(rng, batch, 5)
        seq_lens = [rng.randrange(0, 5 * page_size) for _ in range(batch)]  # some trees run past the table
        for capacity in (batch * nodes, max(1, sum(size) // 2)):  # and some past the rows
            case = (token, parent, size, seq_lens, table, page_size, capacity)
            assert build(device, *case) == expected(*case)
        idle = {b for b in range(batch) if rng.random() < 0.4}
        fewer = [0 if b in idle else n for b, n in enumerate(size)]
        assert build(device, *case, idle) == expected(token, parent, fewer, *case[3:])


def test_ancestors_hold_the_parents_word_and_the_node(device):
    rng = random.Random(5)
    token, parent, size = random_trees(rng, 4, 64, sizes=[64] * 4, vocab=64)
    got = build(device, token, parent, size, [9] * 4, random_table(rng, 4, 2), 64, 256)
    for words, parents, depths in zip(got["tree_ancestors"], parent, got["tree_depth"]):
        assert words[0] == 1 and depths[0] == 0
        for node in range(1, 64):
            assert words[node] == signed(words[parents[node]] & (1 << 64) - 1 | 1 << node) and depths[node] == depths[parents[node]] + 1


def test_a_page_that_is_not_there_gives_no_slot(device):
    got = build(device, [[3, 4, 5]], [[-1, 0, 1]], [3], [15], [[7, -1]], 16, 3)
    assert got["row_slot"] == [7 * 16 + 15, -1, -1]


def span(device, history, start, end, table, page_size, capacity):
    batch = len(history)
    shapes = dict(row_offset=(batch + 1, I32), row_request=(capacity, I32), row_token=(capacity, I32), row_position=(capacity, I32),
                  row_prefix=(capacity, I32), row_slot=(capacity, I64), num_rows=(1, I32))
    out = {name: poisoned(n, dtype=dtype, device=device) for name, (n, dtype) in shapes.items()}
    ops.span_rows(*(ints(x, device) for x in (history, start, end, table)), page_size, *out.values())
    return {name: t.tolist() for name, t in out.items()}


@pytest.mark.parametrize("batch", [1, 5, 67])
def test_span_rows_equals_brute_force(device, batch):
    rng = random.Random(batch)
    length, page_size, capacity = 70, 16, batch * 40
    history = [[rng.randrange(1000) for _ in range(length)] for _ in range(batch)]
    table = random_table(rng, batch, 4)  # 64 positions: the last ones have no slot
    start = [rng.randrange(0, 70) for _ in range(batch)]
    end = [s + rng.randrange(-5, 40) for s in start]
    end = [min(e, length) for e in end]
    rows, offsets = [], []
    for b in range(batch):
        offsets.append(len(rows))
        rows += [(b, history[b][t], t, t + 1, slot_of(table[b], page_size, t)) for t in range(start[b], end[b])]
    got = span(device, history, start, end, table, page_size, capacity)
    for i, name in enumerate(["row_request", "row_token", "row_position", "row_prefix", "row_slot"]):
        assert got[name] == [r[i] for r in rows] + [POISON] * (capacity - len(rows)), name
    assert got["row_offset"] == offsets + [len(rows)] and got["num_rows"] == [len(rows)]


def test_a_wrong_argument_is_named(device):
    with pytest.raises(RuntimeError, match="tree_build.*'tree_token'.*64"):
        build(device, [[0] * 65], [[0] * 65], [1], [0], [[0]], 16, 65)
    with pytest.raises(RuntimeError, match="tree_build.*'page_size'"):
        build(device, [[0]], [[0]], [1], [0], [[0]], 0, 1)
    with pytest.raises(RuntimeError, match="span_rows.*'start'"):
        span(device, [[0]], [0, 0], [1], [[0]], 16, 1)


@pytest.mark.parametrize("most_levels", [1, 4])
@pytest.mark.parametrize("batch", [1, 2, 5, 9, 150])
def test_path_rows_equals_brute_force(device, batch, most_levels):
    """Slots that are not in the round, that have no drafter, and whole paths; with mask rows behind and without."""
    rng, page_size, nodes, length = random.Random(batch), 16, 8, 200
    table = random_table(rng, batch, 20)
    history = [[rng.randrange(1000) for _ in range(length)] for _ in range(batch)]
    path_len = [rng.randrange(0, nodes + 1) for _ in range(batch)]
    seq_lens = [rng.randrange(p, length) if rng.random() < 0.8 else p for p in path_len]
    max_nodes = [rng.choice([0, 3, 7]) for _ in range(batch)]
    offset = [0]
    for _ in range(batch):
        offset.append(offset[-1] + rng.randrange(1, nodes))
    path = [[rng.randrange(0, nodes) for _ in range(nodes)] for _ in range(batch)]
    levels = [rng.randrange(0, most_levels + 1) for _ in range(batch)]
    capacity = batch * (nodes + most_levels) + 3
    names = dict(request=I32, token=I32, position=I32, prefix=I32, slot=torch.int64, source=I32, place=I32)
    out = {name: poisoned(capacity, dtype=dtype, device=device) for name, dtype in names.items()}
    num_rows = poisoned(1, dtype=I32, device=device)
    ops.path_rows(*(ints(x, device) for x in (history, seq_lens, path_len, max_nodes)), ints(levels, device) if most_levels > 1 else None, most_levels, 77,
                  *(ints(x, device) for x in (path, offset, table)), page_size, *out.values(), num_rows)
    want = []
    for b in range(batch):
        true = path_len[b] if max_nodes[b] else 0
        for i in range(true + max(levels[b], 1) - 1 if true else 0):
            at, behind = seq_lens[b] - path_len[b] + i, i - (true - 1)
            known = (history[b][at + 1], offset[b] + path[b][i]) if i < true else (77, -1)
            want.append((b, known[0], at, at + 1, slot_of(table[b], page_size, at), known[1], b * most_levels + behind if behind >= 0 else -1))
    n = num_rows.item()
    assert n == len(want) and list(zip(*(t[:n].tolist() for t in out.values()))) == want
    assert all((t[n:] == -77777).all() for t in out.values())
