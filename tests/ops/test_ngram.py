import random

import pytest
import torch

from specrt import ops
from tests.kit.compare import poisoned
from tests.ops.tree_cases import F32, POISON, exp32, gumbel, ints, log32

SEED = 0x1234567890ABCDE


def propose(device, histories, max_nodes, max_depth, min_n, max_n, branches, temperature=0.0, nodes=64, capacity=None):
    """token, parent [B][N] and size [B]; a history is the list of known tokens, the root last."""
    batch, capacity = len(histories), capacity or max(len(h) for h in histories) + 3
    padded = [h + [h[-1]] * (capacity - len(h)) for h in histories]  # what stands after the known tokens would match, were it read
    sampling = torch.zeros(batch, 6, device=device)
    sampling[:, ops.TEMPERATURE] = ints([temperature] * batch, device, torch.float32) if not isinstance(temperature, list) else ints(temperature, device, torch.float32)
    token, parent = (poisoned(batch, nodes, dtype=torch.int32, device=device) for _ in range(2))
    size = poisoned(batch, dtype=torch.int32, device=device)
    ops.ngram_propose(ints(padded, device), ints([len(h) - 1 for h in histories], device), ints(max_nodes, device), ints(max_depth, device), min_n, max_n,
                      branches, ints([SEED + b for b in range(batch)], device, torch.int64), sampling, token, parent, size)
    return token.tolist(), parent.tolist(), size.tolist()


def chain(device, known, k, min_n, max_n, **rest):
    """The drafts of branches = 1, checked to be a chain."""
    token, parent, size = propose(device, [known], [k], [k], min_n, max_n, 1, **rest)
    assert parent[0][1 : size[0]] == list(range(size[0] - 1))
    assert token[0][0] == POISON and set(token[0][size[0] :]) <= {POISON}
    return token[0][1 : size[0]]


def occurrences(known, min_n, max_n):
    """(-tokens matched, last position) of every earlier end of a match, best first."""
    found, last = [], len(known) - 1
    for end in range(last):
        n = 0
        while n < max_n and end - n >= 0 and known[end - n] == known[last - n]:
            n += 1
        if n >= min_n:
            found.append((-n, end))
    return sorted(found)


def expected(known, max_nodes, max_depth, min_n, max_n, branches, temperature, seed, nodes):
    """By a whole trie, scored everywhere and sorted once."""
    token, parent = [POISON] * nodes, [POISON] * nodes
    if max_nodes <= 0:
        return token, parent, POISON
    budget = min(max_nodes, nodes - 1)
    chosen = occurrences(known, min_n, max_n)[: 1 if branches == 1 and temperature == 0 else 32]
    count, order = {}, {}
    for i, (_, end) in enumerate(chosen):
        path = ()
        for t in known[end + 1 : end + 1 + min(max_depth, budget)]:
            path += (t,)
            count[path] = count.get(path, 0) + 1
            order.setdefault(path, (i, len(path)))
    score = {(): F32(0)}
    for path in sorted(count, key=len):  # each parent once, by its first child
        up = path[:-1]
        siblings = sorted((p for p in count if p[:-1] == up), key=order.get)
        if up not in score or siblings[0] != path:
            continue
        total = sum(count[s] for s in siblings)
        x = {s: log32(F32(count[s]) / F32(total)) for s in siblings}
        if temperature > 0:
            x = {s: F32(x[s] + gumbel(seed, len(known) - 1 + len(s), s[-1], ops.NOISE_SHARED)) for s in siblings}
            most, mass = max(x.values()), F32(0)
            for s in siblings:
                mass = F32(mass + exp32(F32(x[s] - most)))
            lse = F32(most + log32(mass))
        for s in sorted(siblings, key=lambda s: (-x[s], order[s]))[:branches]:
            own = x[s] if temperature == 0 else min(F32(0), F32(x[s] - lse))
            score[s] = F32(score[up] + own)
    del score[()]
    kept = sorted(score, key=lambda p: (-score[p], order[p]))[:budget]
    number = {(): 0, **{p: i + 1 for i, p in enumerate(kept)}}
    for p in kept:
        token[number[p]], parent[number[p]] = p[-1], number[p[:-1]]
    return token, parent, len(kept) + 1


# ---- vLLM's rule, by hand


def test_the_earliest_occurrence_of_the_longest_match(device):
    known = [1, 2, 3, 40, 41, 9, 2, 3, 50, 51, 1, 2, 3, 60, 61, 1, 2, 3]
    assert chain(device, known, 2, 1, 5) == [40, 41]  # 1 2 3 occurs twice before: the first one
    assert chain(device, known, 2, 1, 2) == [40, 41]
    assert chain(device, [9, 2, 3, 50, 51, 1, 2, 3, 60, 61, 1, 2, 3], 2, 2, 3) == [60, 61]  # a longer match beats an earlier one


def test_no_match_of_min_n_no_draft(device):
    assert chain(device, [1, 2, 3, 4, 9, 3], 3, 2, 4) == []
    assert chain(device, [1, 2, 3, 4, 9, 3], 3, 1, 4) == [4, 9, 3]
    assert chain(device, [7], 3, 1, 4) == []
    assert chain(device, [1, 2, 3], 3, 1, 4) == []


def test_a_match_may_overlap_the_suffix_and_stops_at_the_known_end(device):
    assert chain(device, [5, 5, 5, 5], 5, 1, 3) == [5]  # the earliest of length 3 ends at position 2
    assert chain(device, [1, 2, 1, 2, 1, 2], 8, 2, 2) == [1, 2, 1, 2]
    assert chain(device, [1, 2, 1, 2, 1, 2], 8, 3, 4) == [1, 2]


def test_a_match_may_begin_the_history(device):
    assert chain(device, [4, 8, 15, 16, 4, 8], 3, 2, 5) == [15, 16, 4]


def test_budget_and_depth_clip_the_chain(device):
    known = [1, 2, 3, 4, 5, 6, 7, 8, 1]
    assert chain(device, known, 4, 1, 3) == [2, 3, 4, 5]
    for max_nodes, max_depth, length in [(5, 3, 3), (3, 5, 3), (9, 0, 0)]:
        assert propose(device, [known], [max_nodes], [max_depth], 1, 3, 1)[2] == [1 + length]
    assert propose(device, [known], [60], [60], 1, 3, 1, nodes=4)[2] == [4]


def test_a_slot_without_budget_is_left_alone(device):
    token, parent, size = propose(device, [[1, 1, 1, 1], [1, 1, 1, 1]], [0, 2], [4, 4], 1, 2, 1)
    assert set(token[0] + parent[0]) == {POISON} and size == [POISON, 2 + 1]


# ---- trees


def test_counts_decide_a_tree(device):
    known = [1, 7, 8, 1, 7, 9, 1, 6, 6, 1]  # after 1: 7 twice, 6 once; after 1 7: 8 and 9
    token, parent, size = propose(device, [known], [4], [2], 1, 1, 3)
    assert size == [5] and token[0][1:5] == [7, 8, 9, 6] and parent[0][1:5] == [0, 1, 1, 0]
    assert propose(device, [known], [4], [2], 1, 1, 1, temperature=0.0)[0][0][1:3] == [7, 8]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("branches", [1, 2, 4, 40])
@pytest.mark.parametrize("vocab", [1, 2, 3, 12])
def test_ngram_equals_a_scored_trie(device, temperature, branches, vocab):
    rng = random.Random(vocab * 10 + branches)
    histories = [[rng.randrange(vocab) for _ in range(rng.choice([1, 2, 9, 60, 150, 300]))] for _ in range(7)]
    max_nodes = [rng.choice([0, 1, 5, 16, 70]) for _ in histories]
    max_depth = [rng.choice([0, 1, 4, 9, 80]) for _ in histories]
    min_n, max_n = rng.randint(1, 2), rng.randint(2, 5)
    got = propose(device, histories, max_nodes, max_depth, min_n, max_n, branches, temperature, nodes=33)
    for b, known in enumerate(histories):
        want = expected(known, max_nodes[b], max_depth[b], min_n, max_n, branches, temperature, SEED + b, 33)
        assert (got[0][b], got[1][b], got[2][b]) == want


def test_a_long_history(device):
    """Longer than a block's stride on CUDA, with matches of several lengths everywhere."""
    rng = random.Random(3)
    known = [rng.randrange(40) for _ in range(20000)]
    got = propose(device, [known, known[:9000]], [40, 40], [8, 8], 1, 4, 4, [0.0, 0.7])
    for b, h in enumerate([known, known[:9000]]):
        want = expected(h, 40, 8, 1, 4, 4, [0.0, 0.7][b], SEED + b, 64)
        assert (got[0][b], got[1][b], got[2][b]) == want


def test_a_wrong_argument_is_named(device):
    for bad, name in [((0, 2, 1), "min_n"), ((3, 2, 1), "max_n"), ((1, 2, 0), "branches")]:
        with pytest.raises(RuntimeError, match=f"ngram_propose.*'{name}'"):
            propose(device, [[1, 2, 3, 4, 5]], [1], [1], *bad)
