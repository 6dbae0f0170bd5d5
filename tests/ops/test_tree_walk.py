import math
import random

import pytest
import torch

from specrt import ops
from tests.kit.compare import poisoned
from tests.ops.tree_cases import POISON, coin, ints, random_trees

I32 = torch.int32


def run(device, token, parent, size, target, status, synthetic=None):
    """path, path_len, emitted, error; ``synthetic``: (seq_lens, seeds, acceptance length)."""
    batch, nodes = len(token), len(token[0])
    offset = [sum(size[:b]) for b in range(batch + 1)]
    path, emitted = (poisoned(batch, nodes, dtype=I32, device=device) for _ in range(2))
    path_len, error = (poisoned(batch, dtype=I32, device=device) for _ in range(2))
    tree = [ints(x, device) for x in (token, parent, size, offset, target or [0], status or [0])]
    if synthetic:
        seq_lens, seeds, mean = synthetic
        ops.accept_synthetic(*tree, ints(seq_lens, device), ints(seeds, device, torch.int64), mean, path, path_len, emitted, error)
    else:
        ops.accept_walk(*tree, path, path_len, emitted, error)
    return path.tolist(), path_len.tolist(), emitted.tolist(), error.tolist()


def longest_path(token, parent, size, target, status, first):
    """By brute force over all nodes (not a walk): the longest path from the root whose every edge is the target's token at its parent."""
    best = [0]
    for leaf in range(size):
        path, node = [leaf], leaf
        while parent[node] >= 0:
            node = parent[node]
            path.insert(0, node)
        if all(token[b] == target[first + a] for a, b in zip(path, path[1:])) and len(path) > len(best):
            best = path
    emitted = [token[n] for n in best[1:]] + [target[first + best[-1]]]
    for i, node in enumerate(best):
        if status[first + node]:
            return best[:i], emitted[:i], status[first + node]
    return best, emitted, 0


@pytest.mark.parametrize("batch,nodes", [(1, 1), (1, 64), (3, 40), (9, 64), (130, 6)])
@pytest.mark.parametrize("broken", [0.0, 0.2])
def test_accept_walk_is_the_longest_matching_path(device, batch, nodes, broken):
    rng = random.Random(nodes + batch)
    lengths = set()
    for _ in range(6):
        token, parent, size = random_trees(rng, batch, nodes, vocab=3 + nodes // 6)
        rows = sum(size)
        status = [rng.choice([1, 2]) if rng.random() < broken else 0 for _ in range(rows)]
        target, want = [rng.randrange(6) for _ in range(rows)], []
        for b in range(batch):  # most nodes with children: the target picks one of them
            for node in range(size[b]):
                children = [c for c in range(size[b]) if parent[b][c] == node]
                if children and rng.random() < 0.8:
                    target[sum(size[:b]) + node] = token[b][rng.choice(children)]
        got = run(device, token, parent, size, target, status)
        for b in range(batch):
            path, emitted, error = longest_path(token[b], parent[b], size[b], target, status, sum(size[:b])) if size[b] else ([], [], 0)
            lengths.add(len(path))
            pad = [POISON] * (nodes - len(path))
            want.append((path + pad, len(path), emitted + pad, error))
        assert list(zip(*got)) == want
    assert nodes == 1 or max(lengths) >= 3  # the cases do accept something


def test_a_broken_row_off_the_path_is_not_an_error(device):
    got = run(device, [[5, 6, 7]], [[-1, 0, 0]], [3], [7, 1, 9], [0, 2, 0])
    assert got == ([[0, 2, POISON]], [2], [[7, 9, POISON]], [0])


def test_a_broken_root_emits_nothing(device):
    assert run(device, [[5, 6]], [[-1, 0]], [2], [6, 1], [1, 0]) == ([[POISON] * 2], [0], [[POISON] * 2], [1])


@pytest.mark.parametrize("mean", [1.0, 1.7, 3.2, 5.0, 60.5])
def test_accept_synthetic_takes_first_children(device, mean):
    rng = random.Random(int(mean * 10))
    batch, nodes = 40, 12
    token, parent, size = random_trees(rng, batch, nodes, vocab=20)
    target, status = [rng.randrange(1000) for _ in range(sum(size))], [0] * sum(size)
    seq_lens, seeds = [rng.randrange(5000) for _ in range(batch)], [rng.randrange(-(2**63), 2**63) for _ in range(batch)]
    want = []
    for b in range(batch):
        first = sum(size[:b])
        most = math.floor(mean) + int(coin(seeds[b], seq_lens[b] + 1, 0, ops.NOISE_ACCEPT) < mean - math.floor(mean))
        path = [0] if size[b] else []
        while 0 < len(path) < most and path[-1] in parent[b][: size[b]]:
            path.append(parent[b].index(path[-1]))
        emitted = [token[b][n] for n in path[1:]] + ([target[first + path[-1]]] if path else [])
        pad = [POISON] * (nodes - len(path))
        want.append((path + pad, len(path), emitted + pad, 0))
    assert list(zip(*run(device, token, parent, size, target, status, (seq_lens, seeds, mean)))) == want


def test_accept_synthetic_has_the_mean_asked_for(device):
    batch, nodes = 4000, 8
    chain = [[-1, 0, 1, 2, 3, 4, 5, 6]] * batch
    got = run(device, [[1] * nodes] * batch, chain, [nodes] * batch, [2] * (batch * nodes), [0] * (batch * nodes), (list(range(batch)), [11] * batch, 3.2))
    assert set(got[1]) == {3, 4} and abs(sum(got[1]) / batch - 3.2) < 0.03  # 4.7 standard deviations


def test_accept_synthetic_stops_before_a_broken_row(device):
    got = run(device, [[5, 6, 7, 8]], [[-1, 0, 1, 2]], [4], [1, 2, 3, 4], [0, 0, 1, 0], ([3], [1], 4.0))
    assert got == ([[0, 1, POISON, POISON]], [2], [[6, 7, POISON, POISON]], [1])
    with pytest.raises(RuntimeError, match="accept_synthetic.*'acceptance_length'"):
        run(device, [[5]], [[-1]], [1], [1], [0], ([3], [1], 0.5))


@pytest.mark.parametrize("batch", [1, 6, 37])
def test_round_advance_commits_the_tokens(device, batch):
    rng = random.Random(batch)
    nodes, length, vocab = 40, 60, 7
    path_len = [rng.choice([0, 1, nodes, rng.randint(1, nodes)]) for _ in range(batch)]
    emitted = [[rng.randrange(vocab) for _ in range(n)] + [POISON] * (nodes - n) for n in path_len]
    seq_lens = [rng.randrange(0, 30) for _ in range(batch)]  # some blocks run past the history's end
    history = [[rng.randrange(vocab) for _ in range(s + 1)] + [POISON] * (length - s - 1) for s in seq_lens]
    count = [[rng.randrange(3) for _ in range(vocab)] for _ in range(batch)]
    limit = [s + rng.choice([1, n, n + 1, 50]) for s, n in zip(seq_lens, path_len)]
    active = [rng.randrange(2) for _ in range(batch)]
    roots = [[rng.randrange(vocab)] + [POISON] * (nodes - 1) for _ in range(batch)]
    state = [ints(x, device) for x in (seq_lens, history, count, active, roots)]
    ops.round_advance(ints(path_len, device), ints(emitted, device), ints(limit, device), *state)
    for b in range(batch):
        new = emitted[b][: path_len[b]]
        assert state[0][b].item() == seq_lens[b] + len(new)
        assert state[1][b].tolist() == (history[b][: seq_lens[b] + 1] + new + [POISON] * length)[:length]
        assert state[2][b].tolist() == [c + new.count(v) for v, c in enumerate(count[b])]
        assert state[3][b].item() == (active[b] and seq_lens[b] + len(new) < limit[b])
        assert state[4][b].tolist() == [(new or roots[b])[-1 if new else 0]] + [POISON] * (nodes - 1)
