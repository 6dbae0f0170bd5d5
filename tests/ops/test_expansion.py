import random

import numpy as np
import pytest
import torch

from specrt import ops
from tests.kit.compare import poisoned
from tests.ops.tree_cases import F32, POISON, ints, random_table, slot_of

I32 = torch.int32
INF = float("inf")


class Case:
    """An expansion run on the op beside a plain one: candidates as a list of (level, token, parent, score) a slot."""

    def __init__(self, device, seed, width, topk, levels, max_depth, page_size=16, scores=None, extra_depth=0):
        self.rng, self.device, self.width, self.topk, self.levels, self.max_depth = random.Random(seed), device, width, topk, levels, max_depth
        self.batch, self.page_size = len(max_depth), page_size
        self.capacity = topk + (levels - 1) * width * topk
        self.table = random_table(self.rng, self.batch, 4)
        self.seq_lens = [self.rng.randrange(0, 4 * page_size) for _ in max_depth]
        self.scores = scores or (lambda rng: rng.choice([-0.5, -1.0, -1.0, -2.25, -rng.random()]))  # with ties
        self.cands = [[] for _ in max_depth]
        self.beams = [None] * self.batch
        rows, b = self.batch * width, self.batch
        make = lambda *shape, dtype=I32: poisoned(*shape, dtype=dtype, device=device)  # noqa: E731
        self.out = dict(cand_token=make(b, self.capacity), cand_parent=make(b, self.capacity), cand_score=make(b, self.capacity, dtype=torch.float32),
                        beam=make(b, width), row_request=make(rows), row_token=make(rows), row_position=make(rows), row_prefix=make(rows),
                        row_slot=make(rows, dtype=torch.int64), row_path=make(rows, levels + extra_depth), row_parent=make(rows), num_rows=make(1))
        self.want = {name: t.cpu().clone() for name, t in self.out.items()}

    def step(self, level, ranked=True):
        active = [b for b in range(self.batch) if self.max_depth[b] >= level]
        rows = self.batch if level == 1 else self.width * len(active)
        token = [[self.rng.randrange(1000) for _ in range(self.topk)] for _ in range(max(rows, 1))]
        score = [sorted((F32(self.scores(self.rng)) for _ in range(self.topk)), reverse=True) for _ in range(max(rows, 1))]
        if not ranked:  # a token that is missing has no score, all others are equal
            token = [[t if t % 10 else -1 for t in row] for row in token]
            score = [[F32(-INF if t < 0 else 0.0) for t in row] for row in token]
        table, scores = ints(self.table, self.device), torch.tensor(np.array(score), device=self.device) if ranked else None
        ops.tree_expand(level, self.width, ints(token, self.device), scores, ints(self.max_depth, self.device), ints(self.seq_lens, self.device), table, self.page_size, *self.out.values())
        self._expect(level, active, token, score)

    def _expect(self, level, active, token, score):
        first = 0 if level == 1 else self.topk + (level - 2) * self.width * self.topk
        row = 0
        for i, b in enumerate(active):
            cands, came_from = self.cands[b], {}
            sources = [(b, -1)] if level == 1 else [(i * self.width + w, self.beams[b][w]) for w in range(self.width)]
            for r, parent in sources:
                for t, s in zip(token[r], score[r]):
                    came_from[len(cands)] = r
                    total = s if parent < 0 else F32(cands[parent][3] + s)
                    cands.append((level, t, parent, F32(-INF) if np.isnan(total) else total))
            new = range(first, len(cands))
            self.beams[b] = sorted(new, key=lambda c: (-cands[c][3], c))[: self.width]
            n = len(cands)
            self.want["cand_token"][b, :n] = ints([c[1] for c in cands], "cpu")
            self.want["cand_parent"][b, :n] = ints([c[2] for c in cands], "cpu")
            self.want["cand_score"][b, :n] = torch.tensor(np.array([c[3] for c in cands]))
            self.want["beam"][b] = ints(self.beams[b], "cpu")
            if self.max_depth[b] > level:
                for w, c in enumerate(self.beams[b]):
                    path = []
                    while c >= 0:  # by searching the recorded beams, not by arithmetic
                        path.insert(0, (cands[c][0] - 1) * self.width + self.where(b, c))
                        c = cands[c][2]
                    prefix = self.seq_lens[b] + 1
                    values = dict(row_request=b, row_token=cands[self.beams[b][w]][1], row_position=self.seq_lens[b] + level, row_prefix=prefix, row_parent=came_from[self.beams[b][w]],
                                  row_slot=slot_of(self.table[b], self.page_size, prefix + (level - 1) * self.width + w))
                    for name, value in values.items():
                        self.want[name][row] = value
                    self.want["row_path"][row] = -1
                    self.want["row_path"][row, : len(path)] = ints(path, "cpu")
                    row += 1
        self.want["num_rows"][0] = row
        self.history = getattr(self, "history", []) + [[None if x is None else list(x) for x in self.beams]]

    def where(self, b, candidate):
        level = self.cands[b][candidate][0]
        beams = self.beams[b] if level == 1 + len(getattr(self, "history", [])) else self.history[level - 1][b]
        return beams.index(candidate)

    def check(self):
        for name, t in self.out.items():
            assert torch.equal(torch.nan_to_num(t.cpu().double(), nan=POISON), torch.nan_to_num(self.want[name].double(), nan=POISON)), name

    def select(self, max_nodes, nodes=64, max_depth=None, levels=None):
        token, parent = (poisoned(self.batch, nodes, dtype=I32, device=self.device) for _ in range(2))
        size = poisoned(self.batch, dtype=I32, device=self.device)
        ops.tree_select(levels or self.levels, self.width, self.topk, ints(max_nodes, self.device), ints(max_depth or self.max_depth, self.device), self.out["cand_token"],
                        self.out["cand_parent"], self.out["cand_score"], token, parent, size)
        return token.tolist(), parent.tolist(), size.tolist()

    def expected_tree(self, b, max_nodes, max_depth, nodes):
        token, parent = [POISON] * nodes, [POISON] * nodes
        if max_nodes <= 0:
            return token, parent, POISON
        cands, score = self.cands[b], []
        for c in cands:
            score.append(c[3] if c[2] < 0 else min(c[3], score[c[2]]))
        possible = [i for i, c in enumerate(cands) if c[0] <= max_depth and score[i] > -INF]
        kept = sorted(sorted(possible, key=lambda i: (-score[i], i))[: min(max_nodes, nodes - 1)])
        number = {-1: 0, **{c: i + 1 for i, c in enumerate(kept)}}
        for c in kept:
            token[number[c]], parent[number[c]] = cands[c][1], number[cands[c][2]]  # KeyError: not closed under parents
        return token, parent, len(kept) + 1

    def check_select(self, max_nodes, nodes=64, max_depth=None):
        got = self.select(max_nodes, nodes, max_depth)
        for b in range(self.batch):
            want = self.expected_tree(b, max_nodes[b], (max_depth or self.max_depth)[b], nodes)
            assert (got[0][b], got[1][b], got[2][b]) == want
            assert all(got[1][b][i] < i for i in range(1, max(got[2][b], 1)))


SHAPES = [(1, 1, 5), (1, 4, 3), (3, 3, 4), (4, 9, 4), (10, 10, 8), (16, 16, 3)]


@pytest.mark.parametrize("width,topk,levels", SHAPES)
@pytest.mark.parametrize("batch", [1, 5])
def test_expand_and_select_equal_brute_force(device, width, topk, levels, batch):
    rng = random.Random(width + topk + levels)
    depths = [levels] if batch == 1 else [0, levels, rng.randint(1, levels), levels - 1, levels]
    case = Case(device, 7, width, topk, levels, depths)
    for level in range(1, levels + 1):
        case.step(level)
        case.check()
    for budget in (1, 7, 63):
        case.check_select([0 if b == 3 else budget for b in range(batch)])
    case.check_select([20] * batch, nodes=16)
    case.check_select([20] * batch, max_depth=[max(d - 1, 0) for d in depths])


def test_scores_above_the_parents_and_impossible_ones(device):
    """Noise can raise a child above its parent, filters can leave fewer children than k, a broken drafter can give NaN: the tree is closed all the same."""
    pick = lambda rng: rng.choice([0.75, -0.25, -INF, -INF, 0.0, -0.0, rng.random() - 0.5])  # noqa: E731
    case = Case(device, 3, 4, 6, 4, [4, 4, 2], scores=pick)
    for level in range(1, 5):
        case.step(level)
        case.check()
    case.check_select([63, 9, 30])
    broken = Case(device, 4, 2, 3, 2, [2, 2], scores=lambda rng: rng.choice([float("nan"), -1.0]))
    for level in (1, 2):
        broken.step(level)
        broken.check()
    broken.check_select([10, 3])


@pytest.mark.parametrize("ranked", [True, False])
def test_width_one_is_a_chain(device, ranked):
    case = Case(device, 1, 1, 1, 6, [6, 3, 0], extra_depth=2)
    for level in range(1, 7):
        case.step(level, ranked)
        case.check()
    case.check_select([8, 8, 8])
    if not ranked:
        return
    _, parent, size = case.select([8, 8, 8])
    assert size == [7, 4, 1] and parent[0][1:7] == [0, 1, 2, 3, 4, 5] and parent[1][1:4] == [0, 1, 2]


def test_many_candidates(device):
    """More than a block's threads on CUDA, nearly all with equal scores, so that the bound falls among ties."""
    case = Case(device, 2, 16, 16, 9, [9, 9], scores=lambda rng: rng.choice([0.0, 0.0, 0.0, -1.0]))
    for level in range(1, 10):
        case.step(level)
    case.check()
    case.check_select([63, 40])


def test_rows_that_are_not_there_have_no_children(device):
    case = Case(device, 5, 2, 2, 2, [2, 2])
    case.step(1)
    token, score = ints([[5, 6]] * 3, device), torch.full((3, 2), -0.5, device=device)
    ops.tree_expand(2, 2, token, score, ints([2, 2], device), ints(case.seq_lens, device), ints(case.table, device), 16, *case.out.values())
    assert case.out["cand_token"][:, 2:].tolist() == [[5, 6, 5, 6], [5, 6, -1, -1]]
    assert case.out["cand_score"][1, 4:].tolist() == [-INF, -INF]


def test_a_wrong_argument_is_named(device):
    def call(level=1, width=2, topk=3, rows=2, batch=2, capacity=9, path=3):
        make = lambda *shape, dtype=I32: torch.zeros(*shape, dtype=dtype, device=device)  # noqa: E731
        ops.tree_expand(level, width, make(rows, topk), make(rows, topk, dtype=torch.float32), make(batch), make(batch), make(batch, 1), 16, make(batch, capacity),
                        make(batch, capacity), make(batch, capacity, dtype=torch.float32), make(batch, width), *(make(4) for _ in range(4)),
                        make(4, dtype=torch.int64), make(4, path), make(4), make(1))

    call()
    for wrong, name in [(dict(width=4), "beam_width"), (dict(level=3), "cand_token"), (dict(level=0), "level"), (dict(rows=1), "topk_token"),
                        (dict(batch=3, rows=3), "row_request"), (dict(level=2, path=1), "row_path")]:
        with pytest.raises(RuntimeError, match=f"tree_expand.*'{name}'"):
            call(**wrong)


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_limits_are_those_of_slots_that_have_a_tree_to_grow(device, batch):
    rng = random.Random(batch)
    nodes, depth, lens, active = ([rng.choice(values) for _ in range(batch)] for values in ([0, 5, 63], [1, 8], [0, 1, 900], [0, 1]))
    out = [poisoned(batch, dtype=I32, device=device) for _ in range(3)]
    ops.draft_limits(*(ints(x, device) for x in (nodes, depth, lens, active)), 1, *out)
    grows = [n > 0 and length > 0 and a == 1 for n, length, a in zip(nodes, lens, active)]
    assert [t.tolist() for t in out] == [[n * g for n, g in zip(nodes, grows)], [d * g for d, g in zip(depth, grows)], [length - 1 for length in lens]]
