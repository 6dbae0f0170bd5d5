"""The law of what the real ops emit, by Pearson's chi-square, and proof that a test of this size catches every planted error.

All laws are tested at p < 1e-6 a test, well under 1e-4 / the number of tests here; wrong variants must be beyond it with the same N."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from specrt import ops
from tests.kit.sampling import exact, rejection, topk, transform
from tests.laws import model
from tests.laws.model import P, Q

N = 200_000
ALPHA = 1e-6
GOLDEN_P, GOLDEN_Q = (np.array([float(v) for v in law]) for law in (P, Q))


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
    """Pearson's test; cells that are expected fewer than 5 times are pooled. A cell of probability 0 that occurred is certain failure."""
    counts, expected = counts.astype(float).ravel(), law.ravel() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    if rare.any():
        counts, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return float(chi2.sf(((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum(), keep.sum() - 1))


def follows(tokens, law, size: int | None = None) -> bool:
    size = size or law.size
    return p_value(np.bincount(np.asarray(tokens), minlength=size), law) >= ALPHA


def log_rows(law: np.ndarray, n: int, device: str) -> torch.Tensor:
    return torch.from_numpy(law).log().float().expand(n, -1).contiguous().to(device)


def numpy_of(t: torch.Tensor) -> np.ndarray:
    return t.cpu().numpy().astype(np.int64)


def one_node(device, drafts: np.ndarray, levels: int, p=GOLDEN_P, q=GOLDEN_Q, seed=0) -> np.ndarray:
    """The first token accept_rejection emits for each of n trees of a root with these children [n, m]."""
    n, m = drafts.shape
    tree = np.concatenate([np.zeros((n, 1), int), drafts], 1)
    z = log_rows(p, n * (m + 1), device)
    seeds = np.arange(n) + seed
    _, _, emitted, error = rejection(z, tree, np.tile([-1] + [0] * m, (n, 1)), np.full(n, m + 1), log_rows(q, n, device).unsqueeze(1).contiguous(), np.full(n, levels), seeds, np.full(n, 20))
    assert not error.any()
    return numpy_of(emitted[:, 0])


def draw(device, q: np.ndarray, m: int, n: int = N, seed=0, position=20) -> np.ndarray:
    token, _, _ = topk(log_rows(q, n, device), np.arange(n) + seed, np.full(n, position), m, ops.NOISE_DRAFT)
    return numpy_of(token)


# ------------------------------------------------------------------------------------------------ exact sampling


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_sample_exact_follows_p(device, vary):
    z = log_rows(GOLDEN_P, N, device)
    one, many = np.full(N, 9), np.arange(N)
    tokens = numpy_of(exact(z, many, one) if vary == "seed" else exact(z, [2**35 + 1], many))
    assert follows(tokens, GOLDEN_P)
    pairs = tokens[:-1] * 4 + tokens[1:]  # neighbours are independent
    assert follows(pairs, np.outer(GOLDEN_P, GOLDEN_P))


def test_sample_exact_follows_the_transformed_law(device):
    """A larger vocabulary through sample_transform: temperature, top-k, top-p and min-p, each alone and all together."""
    rng, V, n = np.random.default_rng(4), 37, 20_000
    logits = (2 * rng.standard_normal(V)).astype(np.float32)
    cases = [{}, dict(temperature=0.6), dict(top_k=7), dict(top_p=0.8), dict(min_p=0.1), dict(temperature=1.4, top_k=20, top_p=0.9, min_p=0.02)]
    for c, params in enumerate(cases):
        z, _ = transform(torch.from_numpy(logits).expand(1, V).contiguous().to(device), [params])
        law = torch.softmax(z[0].double().cpu(), -1).numpy()
        tokens = numpy_of(exact(z.expand(n, V).contiguous(), [c + 1], np.arange(n)))
        assert follows(tokens, law), params


def test_draft_draws_are_sequential_sampling_without_replacement(device):
    pairs = draw(device, GOLDEN_Q, 2)
    law = np.zeros((4, 4))
    for weight, (a, b) in model.draws(Q, 2, False):
        law[a, b] = float(weight)
    assert follows(pairs[:, 0] * 4 + pairs[:, 1], law)


def test_the_streams_of_a_seed_are_independent(device):
    """A draft's private draw, the target's shared draw: the product law. Shared noise on both sides: the coupling's acceptance, 0.4929."""
    seeds, z, q = np.arange(N), log_rows(GOLDEN_P, N, device), log_rows(GOLDEN_Q, N, device)
    target = numpy_of(exact(z, seeds, np.full(N, 20)))
    assert follows(draw(device, GOLDEN_Q, 1)[:, 0] * 4 + target, np.outer(GOLDEN_Q, GOLDEN_P))
    shared = numpy_of(topk(q, seeds, np.full(N, 20), 1, ops.NOISE_SHARED)[0])[:, 0]
    ratio_p, ratio_q = GOLDEN_P[None, :] / GOLDEN_P[:, None], GOLDEN_Q[None, :] / GOLDEN_Q[:, None]
    acceptance = (1 / np.maximum(ratio_p, ratio_q).sum(1)).sum()
    assert acceptance == pytest.approx(0.4929, abs=1e-4)
    assert (shared == target).mean() == pytest.approx(acceptance, abs=5 * np.sqrt(0.25 / N))
    assert numpy_of(topk(z, seeds, np.full(N, 20), 1, ops.NOISE_SHARED)[0])[:, 0].tolist() == target.tolist()


# ------------------------------------------------------------------------------------------------ one position under rejection


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_rejection_of_sampled_children_gives_p(device, m):
    assert follows(one_node(device, draw(device, GOLDEN_Q, m), 1), GOLDEN_P)


@pytest.mark.parametrize("children", [[0], [1], [3, 1], [1, 3, 0], [2, 0, 1, 3]])
def test_rejection_of_a_point_mass_gives_p(device, children):
    assert follows(one_node(device, np.tile(children, (N, 1)), 0), GOLDEN_P)


def test_rejection_with_disjoint_and_partial_supports_gives_p(device):
    p, q = np.array([0.6, 0.0, 0.4, 0.0, 0.0]), np.array([0.0, 0.5, 0.3, 0.1, 0.1])
    for m in (1, 3):
        assert follows(one_node(device, draw(device, q, m), 1, p, q), p)


def test_acceptance_is_one_minus_total_variation(device):
    drafts = draw(device, GOLDEN_Q, 1)
    z, tree = log_rows(GOLDEN_P, 2 * N, device), np.concatenate([np.zeros((N, 1), int), drafts], 1)
    _, length, _, _ = rejection(z, tree, np.tile([-1, 0], (N, 1)), np.full(N, 2), log_rows(GOLDEN_Q, N, device).unsqueeze(1).contiguous(), np.full(N, 1), np.arange(N), np.full(N, 20))
    assert (length == 2).float().mean().item() == pytest.approx(0.5, abs=5 * np.sqrt(0.25 / N))


def test_planted_errors_at_one_position_are_caught(device):
    """Wrong inputs to the real op (their laws are the quoted ones), and wrong laws sampled N times."""
    argmax = one_node(device, np.full((N, 1), int(GOLDEN_Q.argmax())), 1)
    assert not follows(argmax, GOLDEN_P) and follows(argmax, np.array([float(v) for v in model.argmax_draft_with_q(P, Q)]))
    two = draw(device, GOLDEN_Q, 2)
    kept = np.where(GOLDEN_Q[two[:, 0]] > GOLDEN_Q[two[:, 1]], two[:, 0], two[:, 1])[:, None]
    reranked = one_node(device, kept, 1)
    assert not follows(reranked, GOLDEN_P) and follows(reranked, np.array([float(v) for v in model.pruned(P, Q)]))
    assert follows(one_node(device, kept, 0), GOLDEN_P)  # as a point mass any choice is right
    rng = np.random.default_rng(0)
    for wrong in (model.residual_is_p(P, Q), model.sampled(P, Q, 2, False, raw_q=True)):
        law = np.array([float(v) for v in wrong])
        assert not follows(rng.choice(4, N, p=law), GOLDEN_P) and follows(rng.choice(4, N, p=law), law)


# ------------------------------------------------------------------------------------------------ sequences

V3 = 3
LENGTH = 3


def models() -> tuple[np.ndarray, np.ndarray]:
    """Target and draft next-token laws after 0, 1 and 2 tokens: [1 + 3 + 9, 3], row of a prefix by ``node_of``."""
    rng = np.random.default_rng(11)
    return tuple(rng.dirichlet(np.ones(V3), 13) for _ in range(2))


def node_of(prefix: np.ndarray) -> np.ndarray:
    """[n, length] tokens -> row of the model."""
    n, length = prefix.shape
    index = np.zeros(n, int)
    for d in range(length):
        index = index * V3 + prefix[:, d]
    return index + (0, 1, 4)[length]


def sequence_law(target: np.ndarray) -> np.ndarray:
    law = np.zeros((V3,) * LENGTH)
    for a, b, c in np.ndindex(law.shape):
        law[a, b, c] = target[0, a] * target[1 + a, b] * target[4 + 3 * a + b, c]
    return law


def log_of(laws: np.ndarray, device) -> torch.Tensor:
    return torch.from_numpy(laws).log().float().to(device).contiguous()


def emitted_sequences(device, widths: tuple[int, int], levels: int, n=N) -> np.ndarray:
    """[n, 3]: one round on a tree of widths[0] children at the root and widths[1] under its first child, then plain sampling up to three tokens.

    levels = 2: children drawn from the draft model. levels = 0: its most probable tokens, a point mass."""
    target, draft = models()
    seeds, position = np.arange(n), 40

    def children(prefix: np.ndarray, m: int) -> np.ndarray:
        q = log_of(draft[node_of(prefix)], device)
        return numpy_of(topk(q, seeds, np.full(n, position + prefix.shape[1]), m, ops.NOISE_DRAFT if levels else -1)[0])

    root = np.zeros((n, 0), int)
    first = children(root, widths[0])
    second = children(first[:, :1], widths[1])
    size = 1 + widths[0] + widths[1]
    tree = np.concatenate([np.zeros((n, 1), int), first, second], 1)
    parent = [-1] + [0] * widths[0] + [1] * widths[1]
    z = np.empty((n, size, V3))
    z[:, 0] = target[0]
    for j in range(widths[0]):
        z[:, 1 + j] = target[node_of(first[:, j : j + 1])]
    for j in range(widths[1]):
        z[:, 1 + widths[0] + j] = target[node_of(np.stack([first[:, 0], second[:, j]], 1))]
    q = log_of(np.stack([draft[node_of(root)], draft[node_of(first[:, :1])]], 1), device)
    _, length, emitted, _ = rejection(log_of(z.reshape(n * size, V3), device), tree, np.tile(parent, (n, 1)), np.full(n, size), q, np.full(n, levels), seeds,
                                      np.full(n, position))
    length, out = numpy_of(length), numpy_of(emitted)[:, :LENGTH]
    for d in range(1, LENGTH):
        plain = numpy_of(exact(log_of(target[node_of(out[:, :d] % V3)], device), seeds, np.full(n, position + d)))
        out[:, d] = np.where(length > d, out[:, d], plain)
    return out


def codes(sequences: np.ndarray) -> np.ndarray:
    return (sequences[:, 0] * V3 + sequences[:, 1]) * V3 + sequences[:, 2]


@pytest.mark.parametrize("widths,levels", [((1, 1), 2), ((2, 1), 2), ((3, 2), 2), ((1, 1), 0), ((2, 3), 0)])
def test_three_tokens_follow_the_plain_law(device, widths, levels):
    assert follows(codes(emitted_sequences(device, widths, levels)), sequence_law(models()[0]))


def test_a_reused_coin_is_caught():
    """The chain of two in NumPy, coins drawn afresh (right) and one coin for both levels (wrong)."""
    target, draft = models()
    law = sequence_law(target)

    def chain(reuse: bool) -> np.ndarray:
        rng = np.random.default_rng(3)

        def pick(laws):
            return np.minimum((rng.random((N, 1)) > np.cumsum(laws, -1)).sum(-1), V3 - 1)

        out, alive = np.zeros((N, 0), int), np.ones(N, bool)
        coin = rng.random(N)
        for _ in range(2):
            p, q = target[node_of(out)], draft[node_of(out)]
            x, row = pick(q), np.arange(N)
            u = coin if reuse else rng.random(N)
            accept = alive & (u * q[row, x] < p[row, x])
            rest = np.maximum(p - q, 0)
            rejected = pick(rest / np.maximum(rest.sum(-1, keepdims=True), 1e-300))
            token = np.where(alive, np.where(accept, x, rejected), pick(p))
            out, alive = np.concatenate([out, token[:, None]], 1), accept
        return codes(np.concatenate([out, pick(target[node_of(out)])[:, None]], 1))

    assert follows(chain(False), law)
    assert not follows(chain(True), law)
