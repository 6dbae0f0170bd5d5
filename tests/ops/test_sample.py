import numpy as np
import pytest
import torch

from specrt import ops
from tests.kit.compare import assert_bits, assert_close, poisoned, rows
from tests.kit.sampling import exact, gumbel64, ints, philox_words, reference_transform, rejection, tables, topk, transform

INF = float("inf")
PENALTIES = dict(has_penalty=1, repetition=1.3, presence=0.4, frequency=0.2)
ENDS = [(364, 44920), (517, 10919), (465, 21135)]  # (position, token)
CASES = [
    {}, dict(temperature=0.0), dict(temperature=0.6), dict(top_k=1), dict(top_k=50), dict(top_k=20, temperature=0.7), dict(top_p=0.9), dict(top_p=0.95, temperature=1.9),
    dict(top_p=0.01), dict(min_p=0.1), dict(min_p=1.0), dict(top_k=40, top_p=0.8, min_p=0.05, temperature=0.8), PENALTIES, dict(has_bias=1), dict(has_bias=1, top_p=0.5),
    {**PENALTIES, "has_bias": 1, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3}, {**PENALTIES, "temperature": 0.0}, dict(top_k=100000),
]


@pytest.mark.parametrize("vocab", [1, 3, 33, 130, 1000, 5003])
@pytest.mark.parametrize("ties", [False, True])
def test_transform_equals_the_reference(device, vocab, ties):
    """Every combination of CASES, on rows with masks, stops and counts, to the bit: float32 roundings are the formula's own, thresholds float64's."""
    rng = np.random.default_rng(vocab)
    B = len(CASES)
    logits = (3 * rng.standard_normal((B, vocab))).astype(np.float32)
    if ties:
        logits = np.round(logits * 2) / 2
    count, prompt = rng.poisson(0.3, (B, vocab)), rng.random((B, vocab)) < 0.2
    bias = (2 * rng.standard_normal((B, vocab))).astype(np.float32)
    bias[:, rng.random(vocab) < 0.1] = -INF
    bias[:, 0] = 1.0
    mask = rng.random((2, vocab)) < 0.8
    mask[:, 0] = True
    row_mask, stops = rng.integers(-1, 2, B), rng.integers(1, vocab, (B, 2)) if vocab > 1 else np.full((B, 2), -1)
    params = [{**p, "min_tokens": 4, "prompt_len": 10} for p in CASES]
    position = rng.integers(10, 16, B)  # output indices 1 .. 6
    z, status = transform(torch.from_numpy(logits).to(device), params, np.arange(B), position, stop_ids=stops, bias=torch.from_numpy(bias), output_count=count,
                          prompt_mask=prompt, mask=torch.from_numpy(mask), row_mask=row_mask)
    assert (status.cpu() == ops.STATUS_OK).all()
    for r in range(B):
        allowed = mask[row_mask[r]] if row_mask[r] >= 0 else np.ones(vocab, dtype=bool)
        suppressed = [s for s in stops[r] if s >= 0] if position[r] + 1 - 10 < 4 else []
        want = reference_transform(logits[r], params[r], count[r], prompt[r], bias[r], allowed, suppressed)
        assert_bits(z[r], torch.from_numpy(want))


@pytest.mark.parametrize("vocab", [1, 5, 1000, 50257])
@pytest.mark.parametrize("keep", [False, True])
def test_the_transform_chooses_what_sample_exact_would(device, vocab, keep):
    """The fused choice, to the token, with every filter; a row without a distribution gives token 0."""
    B = len(CASES) + 1
    params, seeds, positions = [*CASES, dict(top_p=0.9)], list(range(7, 7 + B)), list(range(40, 40 + B))
    logits = (3 * torch.randn(B, vocab)).to(device)
    logits[-1, vocab // 2] = float("nan")
    z, status = transform(logits, params, range(B), positions)
    want = exact(z, seeds, positions, [p.get("temperature", 1.0) for p in params])
    want[-1] = 0
    token = poisoned(B, dtype=torch.int32, device=device)
    again, status_again = transform(logits, params, range(B), positions, seeds=seeds, token=token, keep=keep)
    assert token.tolist() == want.tolist() and status_again.tolist() == status.tolist() and status[-1] == ops.STATUS_NOT_FINITE
    if keep:
        assert_bits(again[:-1], z[:-1])


@pytest.mark.parametrize("vocab", [49152, 50257])
def test_transform_of_a_whole_vocabulary(device, vocab):
    cases = [dict(top_k=50), dict(top_k=3000), dict(top_k=vocab - 1), dict(top_p=0.9), dict(top_p=0.9, temperature=3.0), dict(top_k=50, top_p=0.9), dict(top_p=0.999999)]
    logits = 3 * torch.randn(len(cases), vocab)
    z, status = transform(logits.to(device), cases, range(len(cases)))
    assert (status == 0).all()
    none = np.zeros(vocab)
    for r, p in enumerate(cases):
        want = torch.from_numpy(reference_transform(logits[r].numpy(), p, none, none, none, np.ones(vocab, bool), []))
        differing = ((z[r].cpu() > -INF) != (want > -INF)).sum().item()
        assert differing <= (2 if p.get("top_p", 0) > 0.99 else 0), (p, differing)  # masses of 2^-40 are truncated: the last tail token may differ
        kept = (z[r].cpu() > -INF) & (want > -INF)
        assert_bits(z[r].cpu()[kept], want[kept])


def test_equal_logits_are_kept_together(device):
    z, _ = transform(torch.zeros(3, 5000, device=device), [dict(top_k=5), dict(top_p=0.1), dict(min_p=1.0)], range(3))
    assert (z == 0).all()


def test_penalties_count_the_rows_own_ancestors(device):
    """Node 4's path is 0-1-4; the root is counted in output_count already, a sibling is not on the path, a repeated token counts twice."""
    V, token = 40, [[7, 5, 9, 5, 5, 9]]
    words = [0b1, 0b11, 0b101, 0b1011, 0b10011, 0b110011]
    count, prompt = np.zeros((1, V), int), np.zeros((1, V), int)
    count[0, 7], count[0, 5], prompt[0, 9] = 2, 1, 1
    logits = torch.randn(6, V)
    z, _ = transform(logits.to(device), [PENALTIES], None, np.zeros(6), range(6), token, [words], output_count=count, prompt_mask=prompt)
    plain, _ = transform(logits.to(device), [PENALTIES], None, np.zeros(6), output_count=count, prompt_mask=prompt)
    for r, word in enumerate(words):
        own = count[0].copy()
        for j in range(1, 6):
            own[token[0][j]] += word >> j & 1
        args = (prompt[0], np.zeros(V, np.float32), np.ones(V, bool), [])
        assert_bits(z[r], torch.from_numpy(reference_transform(logits[r].numpy(), PENALTIES, own, *args)))
        assert_bits(plain[r], torch.from_numpy(reference_transform(logits[r].numpy(), PENALTIES, count[0], *args)))


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_a_row_that_is_not_finite_is_left_alone(device, bad):
    logits = torch.randn(3, 777)
    logits[1, 776] = bad
    z, status = transform(logits.to(device), [dict(top_k=5, temperature=0.5)])
    assert status.tolist() == [ops.STATUS_OK, ops.STATUS_NOT_FINITE, ops.STATUS_OK]
    assert_bits(z[1], logits[1])
    assert ((z[[0, 2]] > -INF).sum(-1) == 5).all()


def test_a_row_with_everything_masked_says_so(device):
    mask = torch.zeros(2, 100, dtype=torch.bool)
    mask[1, 99] = True
    for temperature in (0.0, 1.0):
        z, status = transform(torch.randn(3, 100, device=device), [dict(temperature=temperature, top_p=0.5)], mask=mask, row_mask=[0, 1, -1])
        assert status.tolist() == [ops.STATUS_ALL_MASKED, ops.STATUS_OK, ops.STATUS_OK]
        assert (z[1] > -INF).nonzero().flatten().tolist() == [99]
    _, status = transform(torch.randn(1, 4, device=device), [dict(has_bias=1)], bias=torch.full((1, 4), -INF))
    assert status.tolist() == [ops.STATUS_ALL_MASKED]


def test_rows_past_num_rows_are_untouched(device):
    logits = torch.randn(4, 64)
    z, status = transform(logits.to(device), [dict(temperature=0.5)], num_rows=2)
    assert_bits(z[2:], logits[2:])
    assert (status[2:] == -77777).all() and (z[:2].cpu() != logits[:2]).all()
    token = poisoned(4, dtype=torch.int32, device=device)
    f, _ = tables([{}], device)
    ops.sample_exact(z, ints([0] * 4, device), ints([0] * 4, device), ints([1], device, torch.int64), f, rows(2, device), token)
    assert (token[2:] == -77777).all() and (token[:2] >= 0).all()


# ------------------------------------------------------------------------------------------------ noise and exact sampling


def test_noise_is_philox_and_gumbel(device):
    """z = 0 leaves the noise itself in draft_topk's scratch: every purpose, seeds of 64 bits, against NumPy's philox and float64 logarithms."""
    V = 1003
    for seed, position, purpose in [(0, 1, 0), (2**40 + 17, 5, 1), (-3, 2**31 - 1, 2), (2**63 - 1, 100, 3)]:
        _, _, g = topk(torch.zeros(1, V, device=device), [seed], [position - 1], 1, purpose)
        want = torch.from_numpy(gumbel64(philox_words(seed, position, np.arange(V), purpose)))
        winners = want > 0
        assert_close(g[0], want, 1e-5)  # W is rounded to float32: coarse where 1 - W is small, which are the losers
        assert_close(g[0].cpu()[winners], want[winners], 2e-7)


def test_noise_keeps_both_ends(device):
    """Words at the ends of the range, found by search (seed 7): (k + 1/2) / 2^32 rounds to 1 in float32 for the first, which as U would give +inf."""
    for position, token in ENDS:
        word = philox_words(7, position, np.array([token]), 0)
        assert word[0] >= 2**32 - 128 or word[0] < 40
        _, _, g = topk(torch.zeros(1, 49152, device=device), [7], [position - 1], 1, ops.NOISE_SHARED)
        got, want = g[0, token].item(), gumbel64(word)[0]
        if word[0] > 40:
            assert np.float32((word[0] + 0.5) * 2.0**-32) == 1 and got == -INF
            z = torch.full((1, 49152), -INF, device=device)
            z[0, token], z[0, 3] = 50.0, -50.0
            assert exact(z, [7], [position - 1]).item() == 3
        else:
            assert abs(got - want) < 3e-6 and 18 < got < 22.88


@pytest.mark.parametrize("vocab", [1, 2, 5, 127, 1000, 16385, 49152])
def test_exact_is_the_argmax_of_z_plus_noise(device, vocab):
    R = 9
    z = 3 * torch.randn(R, vocab)
    z[torch.rand(R, vocab) < 0.2] = -INF
    z[:, -1] = 0.0
    seeds, positions = list(range(100, 100 + R)), list(range(50, 50 + R))
    got = exact(z.to(device), seeds, positions)
    for r in range(R):
        score = z[r].double().numpy() + gumbel64(philox_words(seeds[r], positions[r] + 1, np.arange(vocab), 0))
        assert score[got[r].item()] >= score.max() - 1e-4
    greedy = exact(z.to(device), seeds, positions, temperature=0.0)
    assert greedy.tolist() == z.argmax(-1).tolist()


def test_greedy_and_random_rows_mix_and_do_not_depend_on_the_others(device):
    z = 2 * torch.randn(40, 1001, device=device)
    seeds, temperature = list(range(40)), [r % 2 for r in range(40)]
    every = exact(z, seeds, range(40), temperature)
    assert every[::2].tolist() == z[::2].argmax(-1).tolist()
    for r in (0, 1, 38, 39):
        assert exact(z[r : r + 1], seeds[r : r + 1], [r], temperature[r]).item() == every[r].item()


def test_ties_nan_and_empty_rows(device):
    z = torch.zeros(4, 600, device=device)
    z[0, [599, 300, 17]] = 1.0
    z[1] = float("nan")
    z[1, 599] = -5.0
    z[2] = -INF
    z[3] = float("nan")
    assert exact(z, [1], [3] * 4, 0.0).tolist() == [17, 599, 0, 0]
    assert exact(z, [1], [3] * 4, 1.0).tolist()[1:] == [599, 0, 0]
    z[0, 300:] = -0.0  # equal to +0
    z[0, :300] = -1.0
    assert exact(z, [1], [3] * 4, 0.0).tolist()[0] == 300


# ------------------------------------------------------------------------------------------------ log-probabilities and top-k


def logprobs(z, token, n):
    device, R = z.device.type, z.shape[0]
    lse, logprob = (poisoned(R, dtype=torch.float32, device=device) for _ in range(2))
    top, top_logprob = poisoned(R, n, dtype=torch.int32, device=device), poisoned(R, n, dtype=torch.float32, device=device)
    ops.row_logprobs(z, ints(token, device), rows(R, device), lse, logprob, top, top_logprob)
    return lse, logprob, top, top_logprob


@pytest.mark.parametrize("vocab", [1, 5, 128, 129, 4099, 49152])
@pytest.mark.parametrize("n", [0, 1, 20])
def test_logprobs_match_float64(device, vocab, n):
    z = 5 * torch.randn(5, vocab)
    z[torch.rand(5, vocab) < 0.3] = -INF
    z[:, 0] = 1.0
    token = [0, 0, vocab - 1, vocab // 2, 0]
    lse, logprob, top, top_logprob = logprobs(z.to(device), token, n)
    want = torch.logsumexp(z.double(), -1)
    assert_close(lse, want, 1e-6)
    for r in range(5):
        assert logprob[r].item() == pytest.approx((z[r, token[r]].double() - want[r]).item(), abs=1e-5)
        order = sorted((v for v in range(vocab) if z[r, v] > -INF), key=lambda v: (-z[r, v].item(), v))[:n]
        assert top[r].tolist() == order + [-1] * (n - len(order))
        for i, v in enumerate(order):
            assert top_logprob[r, i].item() == (z[r, v] - lse[r].cpu()).item()
        assert (top_logprob[r, len(order) :] == -INF).all()


def test_logprobs_of_masked_and_impossible_tokens(device):
    z = torch.full((3, 300), -INF)
    z[0, 7] = 2.0
    lse, logprob, top, _ = logprobs(z.to(device), [7, 3, -1], 2)
    assert lse.tolist() == [2.0, -INF, -INF] and logprob.tolist() == [0.0, -INF, -INF] and top.tolist() == [[7, -1], [-1, -1], [-1, -1]]
    z = torch.randn(1, 300)
    assert logprobs(z.to(device), [300], 0)[1].item() == -INF


@pytest.mark.parametrize("noise", [-1, ops.NOISE_SHARED, ops.NOISE_DRAFT])
@pytest.mark.parametrize("vocab,k", [(3, 8), (500, 8), (4099, 64), (49152, 10)])
def test_draft_topk_matches_float64(device, noise, vocab, k):
    z = 3 * torch.randn(3, vocab)
    token, score, perturbed = topk(z.to(device), [11, 12, 13], [5, 6, 7], k, noise)
    for r in range(3):
        want = z[r].double().numpy()
        if noise >= 0:
            want = want + gumbel64(philox_words(11 + r, 6 + r, np.arange(vocab), noise))
        assert_close(perturbed[r], torch.from_numpy(want), 1e-6)
        got = perturbed[r].cpu().numpy()
        kept = min(k, vocab)
        assert token[r].tolist() == sorted(range(vocab), key=lambda v: (-got[v], v))[:kept] + [-1] * (k - kept)
        np.testing.assert_allclose(score[r, :kept].cpu(), want[token[r, :kept].cpu()] - torch.logsumexp(torch.from_numpy(want), 0).item(), atol=2e-5)
        assert (score[r, kept:] == -INF).all()


def test_draft_topk_ties_and_temperature_zero(device):
    token, _, _ = topk(torch.zeros(1, 1000, device=device), [1], [0], 5, ops.NOISE_SHARED, temperature=0.0)
    assert token.tolist() == [[0, 1, 2, 3, 4]]


def test_the_first_shared_noise_child_is_the_targets_token(device):
    z = 2 * torch.randn(64, 3001, device=device)
    token, _, _ = topk(z, range(64), range(64), 4, ops.NOISE_SHARED)
    assert token[:, 0].tolist() == exact(z, range(64), range(64)).tolist()


# ------------------------------------------------------------------------------------------------ rejection


def test_rejection_at_temperature_zero_is_the_greedy_walk(device):
    V = 50
    z = torch.randn(2 * 4, V)
    best = z.argmax(-1)
    token = [[0, 1, best[0], best[2]], [0, best[4], 3, 4]]
    parent = [[-1, 0, 0, 2], [-1, 0, 0, 1]]
    token[1][3] = (best[5] + 1) % V
    path, length, emitted, error = rejection(z.to(device), token, parent, [4, 4], torch.zeros(2, 1, V, device=device), [0, 0], [1, 2], [9, 9], temperature=0.0)
    assert length.tolist() == [3, 2] and error.tolist() == [0, 0]
    assert path[0, :3].tolist() == [0, 2, 3] and emitted[0, :3].tolist() == best[[0, 2, 3]].tolist()
    assert path[1, :2].tolist() == [0, 1] and emitted[1, :2].tolist() == best[[4, 5]].tolist()


@pytest.mark.parametrize("levels", [0, 3])
def test_rejection_without_drafts_without_slots_and_with_bad_rows(device, levels):
    """Slot 0: a root alone; 1: not in the round; 2: the root's row is bad; 3: its drafts fit with certainty, then a bad row."""
    V, N = 9, 3
    z = torch.full((4 * N, V), -INF)
    z[:, 4] = 0.0
    status = np.zeros(4 * N, int)
    status[2 * N], status[3 * N + 2] = ops.STATUS_ALL_MASKED, ops.STATUS_NOT_FINITE
    chain = [[0, 4, 4]] * 4
    q = z[:3].clone().expand(4, 3, V).contiguous()
    path, length, emitted, error = rejection(z.to(device), chain, [[-1, 0, 1]] * 4, [1, 0, 3, 3], q.to(device), [levels] * 4, range(4), [7] * 4, status=status)
    assert length.tolist() == [1, 0, 0, 2] and error.tolist() == [0, 0, ops.STATUS_ALL_MASKED, ops.STATUS_NOT_FINITE]
    assert emitted[0, 0].item() == 4 and path[3, :2].tolist() == [0, 1] and emitted[3, :2].tolist() == [4, 4]


@pytest.mark.parametrize("vocab", [2, 50, 1001])
def test_q_equal_to_p_never_rejects(device, vocab):
    B = 400
    z = (3 * torch.randn(B, vocab, device=device)).repeat_interleave(2, 0).contiguous()
    q = z[::2].unsqueeze(1).contiguous()
    drawn, _, _ = topk(q[:, 0].contiguous(), range(B), [5] * B, 1, ops.NOISE_DRAFT)
    token = torch.cat([torch.zeros(B, 1, dtype=torch.int32), drawn.cpu()], 1)
    _, length, emitted, _ = rejection(z, token, [[-1, 0]] * B, [2] * B, q, [1] * B, range(B), [5] * B)
    assert (length == 2).all() and emitted[:, 0].tolist() == drawn[:, 0].tolist()


@pytest.mark.parametrize("levels", [0, 1])
def test_a_child_with_no_probability_is_never_accepted(device, levels):
    """All children of p = 0 (one not even a token), and a one-hot p whose token comes last: always found."""
    B, V = 300, 6
    p = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.3, 0.2]).log()
    one_hot = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]).log()
    q = torch.tensor([0.4, 0.3, 0.3, 0.0, 0.0, 0.0]).log().expand(B, 1, V).contiguous().to(device)
    token, parent = [[5, 0, 1, -1 if levels == 0 else 2]] * B, [[-1, 0, 0, 0]] * B
    z = p.repeat(B * 4, 1).to(device)
    _, length, emitted, _ = rejection(z, token, parent, [4] * B, q, [levels] * B, range(B), [3] * B)
    assert (length == 1).all() and set(emitted[:, 0].tolist()) == {3, 4, 5}
    token = [[5, 0, 1, 2]] * B
    _, length, emitted, _ = rejection(one_hot.repeat(B * 4, 1).to(device), token, parent, [4] * B, q, [levels] * B, range(B), [3] * B)
    assert (length == 2).all() and (emitted[:, :2] == 2).all()


# ------------------------------------------------------------------------------------------------ both backends


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vocab", [7, 1001, 49152, 128256])
def test_cuda_gives_the_bits_of_the_cpu(vocab):
    torch.manual_seed(vocab)
    B = len(CASES)
    logits, bias = 4 * torch.randn(B, vocab), torch.randn(B, vocab)
    bias[:, vocab // 2] = -INF
    count, prompt = torch.poisson(torch.full((B, vocab), 0.2)).int(), torch.rand(B, vocab) < 0.1
    token, words = torch.randint(0, vocab, (B, 3)), torch.tensor([[1, 3, 7]] * B)
    q = 4 * torch.randn(B, 2, vocab)

    def everything(device):
        z, status = transform(logits.to(device), CASES, range(B), range(B), [r % 3 for r in range(B)], token, words, bias=bias, output_count=count, prompt_mask=prompt)
        out = [z, status, exact(z, range(B), range(B)), *logprobs(z, token[:, 0], 20)]
        for noise in (-1, ops.NOISE_SHARED, ops.NOISE_DRAFT):
            out += topk(z, range(B), range(B), min(vocab, 10), noise)
        draws, _, _ = topk(q[:, 0].contiguous().to(device), range(B), [4] * B, 3, ops.NOISE_DRAFT)
        tree = torch.cat([torch.zeros(B, 1, dtype=torch.int32), draws.cpu()], 1)
        for levels in (0, 1):
            out += rejection(z.repeat_interleave(4, 0).contiguous(), tree, [[-1, 0, 0, 0]] * B, [4] * B, q.to(device), [levels] * B, range(B), [4] * B)[1:3]
        return out

    for on_cpu, on_cuda in zip(everything("cpu"), everything("cuda")):
        assert_bits(on_cuda, on_cpu)


def test_wrong_arguments_are_named(device):
    z = torch.zeros(2, 10, device=device)
    with pytest.raises(RuntimeError, match=r"draft_topk.*'token'.*1 to 64"):
        topk(z, [1], [0, 0], 65, -1)
    with pytest.raises(RuntimeError, match=r"draft_topk.*'noise'"):
        topk(z, [1], [0, 0], 1, 4)
    with pytest.raises(RuntimeError, match=r"sample_transform.*'row_node'"):
        transform(z, [{}], row_node=[0, 0])
