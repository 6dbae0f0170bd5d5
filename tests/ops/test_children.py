"""draft_children against what it fuses: the drafter's logits over the target's tokens, sample_transform, draft_topk; of a head with the target's noise between factors of the logits and of
the sums. Tokens to the bit; scores too, but for the log-sum-exp, which is of the drafter's own columns."""

import numpy as np
import pytest
import torch

from specrt import ops
from specrt.draft.vocabulary import over_target
from tests.kit.compare import assert_bits, poisoned, rows
from tests.kit.sampling import ints, tables

INF = float("inf")
SLOPE = 1.2  # csrc/sample/token.h
CASES = [
    {}, dict(temperature=0.0), dict(temperature=0.6), dict(top_k=1), dict(top_k=50), dict(top_p=0.9), dict(top_p=0.01), dict(top_k=20, temperature=0.7), dict(min_p=0.1), dict(has_bias=1),
    dict(top_k=40, top_p=0.8, min_p=0.05, temperature=0.8), dict(has_bias=1, temperature=0.0), dict(has_bias=1, top_p=0.5, temperature=1.9), dict(top_k=100000), dict(has_penalty=1, repetition=2.0),
]


def children(logits, ids, vocab, params, k, noise, ahead, position, stops, bias, used=None, of_head=True):
    """(fused, separate), each (token, score), of rows that are slots."""
    device, R = logits.device.type, len(logits)
    f, i = tables([{**p, "min_tokens": 4, "prompt_len": 10} for p in params], device)
    request, seeds, n = ints(np.arange(R)[::-1].copy(), device), ints(np.arange(R) + (1 << 40), device, torch.int64), rows(R if used is None else used, device)
    stops, bias = ints(stops, device), bias.to(device)
    out = [(poisoned(R, k, dtype=torch.int32, device=device), poisoned(R, k, dtype=torch.float32, device=device)) for _ in range(2)]
    raw = logits.clone()
    ops.draft_children(logits, 0, 0, ids, request, ints(position, device), ahead, f, i, stops, bias, seeds, noise, of_head, n, *out[0])
    assert_bits(logits, raw)
    of_slots = [torch.empty_like(t) for t in out[0]]  # the same logits, among others of their slots
    spread = torch.full((3 * R, logits.shape[1]), 7.0, device=device)
    spread[request.long() * 3 + 1] = logits
    ops.draft_children(spread, 3, 1, ids, request, ints(position, device), ahead, f, i, stops, bias, seeds, noise, of_head, n, *of_slots)
    unranked = torch.empty_like(out[0][0])
    ops.draft_children(logits, 0, 0, ids, request, ints(position, device), ahead, f, i, stops, bias, seeds, noise, of_head, n, unranked, None)
    used = R if used is None else used
    assert torch.equal(of_slots[0][:used], out[0][0][:used]) and torch.equal(unranked[:used], out[0][0][:used])
    assert_bits(of_slots[1][:used], out[0][1][:used])
    z, before = torch.empty(R, vocab, device=device), ints(position + ahead - 1, device)
    over_target(logits, ids, z)
    i[:, ops.HAS_PENALTY] = 0
    zeros = torch.zeros(R, vocab, dtype=torch.int32, device=device)
    ops.sample_transform(z, request, before, None, None, None, f, i, stops, bias, zeros, zeros.to(torch.uint8), None, None, n, ints(np.zeros(R), device))
    temperature = f[request.long(), ops.TEMPERATURE][:, None]
    foretold, scores = (temperature > 0) & (of_head and noise == ops.NOISE_SHARED), torch.empty_like(z)
    ops.draft_topk(torch.where(foretold, z * SLOPE, z), request, before, seeds, f, noise, n, scores, *out[1])
    ops.draft_topk(torch.where(foretold, scores * temperature, scores), request, before, seeds, f, -1, n, torch.empty_like(z), *out[1])
    return out


def close(score, want):
    torch.testing.assert_close(score, want, rtol=1e-5, atol=1e-5)


def own_ids(rng, vocab, columns):
    return torch.from_numpy(np.sort(rng.choice(vocab, columns, replace=False)))


@pytest.mark.parametrize("noise,of_head", [(-1, True), (ops.NOISE_SHARED, True), (ops.NOISE_SHARED, False), (ops.NOISE_DRAFT, True)])
@pytest.mark.parametrize("vocab,columns,k", [(7, 5, 3), (130, 64, 1), (1000, 333, 10), (5003, 5002, 4), (49152, 8001, 64)])
def test_children_are_those_of_the_separate_ops(device, vocab, columns, k, noise, of_head):
    """Every filter, with bias and stops. Where fewer than k of the drafter's tokens are left, the separate ops go on with tokens it does not have; these are missing."""
    rng = np.random.default_rng(vocab + k)
    R = len(CASES)
    ids = own_ids(rng, vocab, columns)
    logits = torch.from_numpy((3 * rng.standard_normal((R, columns))).astype(np.float32))
    logits[1::3] = (logits[1::3] * 2).round() / 2  # ties
    bias = torch.from_numpy((2 * rng.standard_normal((R, vocab))).astype(np.float32))
    bias[:, rng.random(vocab) < 0.1] = -INF
    bias[:, ids[0]] = 1.0
    stops, position = rng.choice(ids[1:].numpy(), (R, 2)), rng.integers(10, 16, R)
    (token, score), (want, want_score) = children(logits.to(device), ids.to(device), vocab, CASES, k, noise, 2, position, stops, bias, used=R - 1, of_head=of_head)
    there = (want >= 0) & torch.isin(want.long(), ids.to(device))
    assert torch.equal(token[:-1], torch.where(there, want, -1)[:-1])
    close(score[:-1], torch.where(there, want_score, -INF)[:-1])
    assert (token[-1] == -77777).all() and torch.isnan(score[-1]).all()
    assert there[:-1].float().mean() > 0.5


@pytest.mark.parametrize("vocab,columns", [(500, 500), (500, 300), (300, 500), (1, 1), (50257, 50000)])
def test_without_ids_the_tokens_are_the_columns(device, vocab, columns):
    rng = np.random.default_rng(columns)
    R = len(CASES)
    logits = torch.from_numpy((3 * rng.standard_normal((R, columns))).astype(np.float32))
    stops, bias, position = np.full((R, 1), -1), torch.zeros(R, vocab), rng.integers(10, 16, R)
    (token, score), (want, want_score) = children(logits.to(device), None, vocab, CASES, 4, ops.NOISE_SHARED, 1, position, stops, bias)
    there = (want >= 0) & (want < columns)
    assert torch.equal(token, torch.where(there, want, -1))
    (assert_bits if columns == vocab else close)(score, torch.where(there, want_score, -INF))


@pytest.mark.parametrize("params", [{}, dict(temperature=0.0), dict(top_k=3, top_p=0.9)])
def test_a_row_that_is_not_finite_has_no_children(device, params):
    logits = torch.randn(5, 40)
    logits[0, 3], logits[1, 39], logits[2, 0] = float("nan"), INF, -INF
    bias = torch.zeros(5, 1000)
    bias[1, 7::7] = -INF  # row 3's slot: nothing is left
    (token, score), (want, want_score) = children(logits.to(device), torch.arange(7, 1000, 7)[:40].to(device), 1000, [{**params, "has_bias": 1}] * 5, 2, ops.NOISE_SHARED, 1,
                                                  np.full(5, 20), np.full((5, 1), -1), bias)
    assert (token[:4] == -1).all() and (score[:4] == -INF).all()
    assert torch.equal(token[4], want[4])
    close(score[4], want_score[4])


def test_logits_whose_scores_would_be_infinite_have_no_children(device):
    logits = torch.randn(2, 40)
    logits[0, 3] = 3e38
    (token, score), _ = children(logits.to(device), None, 40, [{}] * 2, 3, ops.NOISE_SHARED, 1, np.full(2, 20), np.full((2, 1), -1), torch.zeros(2, 40))
    assert (token[0] == -1).all() and (score[0] == -INF).all() and (token[1] >= 0).all()


def test_a_row_alone_has_the_children_it_has_among_many(device):
    rng = np.random.default_rng(3)
    ids, logits = own_ids(rng, 30000, 9000).to(device), torch.randn(40, 9000).to(device)
    f, i = tables([dict(top_p=0.95)], device)

    def run(z):
        R = len(z)
        token, score = poisoned(R, 10, dtype=torch.int32, device=device), poisoned(R, 10, dtype=torch.float32, device=device)
        ops.draft_children(z, 0, 0, ids, ints(np.zeros(R), device), ints(np.full(R, 9), device), 1, f, i, ints([[-1]], device), torch.zeros(1, 30000, device=device),
                           ints([5], device, torch.int64), ops.NOISE_SHARED, True, rows(R, device), token, score)
        return token, score

    many = run(logits)
    for r in (0, 39):
        for one, all_rows in zip(run(logits[r : r + 1].contiguous()), many):
            assert_bits(one[0], all_rows[r])


def test_a_wrong_argument_is_named(device):
    def call(k=2, noise=0, ids=torch.int64, slot_rows=0, level=0):
        f, i = tables([{}], device)
        ops.draft_children(torch.zeros(1, 3, device=device), slot_rows, level, torch.arange(3, device=device, dtype=ids), ints([0], device), ints([0], device), 1, f, i, ints([[-1]], device),
                           torch.zeros(1, 9, device=device), ints([5], device, torch.int64), noise, True, rows(1, device), ints(np.zeros((1, k)), device), torch.zeros(1, k, device=device))

    call()
    for wrong, name in [(dict(k=65), "token"), (dict(noise=4), "noise"), (dict(ids=torch.int32), "ids"), (dict(slot_rows=2), "logits"), (dict(slot_rows=1, level=1), "logits")]:
        with pytest.raises(RuntimeError, match=f"draft_children.*'{name}'"):
            call(**wrong)
