"""verification.md 9.1 and 9.2, exactly: the right verifiers give p, the wrong ones the numbers quoted there."""

import random
from fractions import Fraction
from itertools import permutations

import pytest

from tests.laws.model import P, Q, argmax_draft_with_q, plain, prefixes, pruned, residual_is_p, sampled, speculated, target_only


def test_a_chain_gives_p():
    assert sampled(P, Q, 1, True) == P


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("replace", [True, False])
def test_multi_round_gives_p(m, replace):
    assert sampled(P, Q, m, replace) == P


def test_target_only_gives_p_for_every_ordered_subset():
    for m in range(5):
        for children in permutations(range(4), m):
            assert target_only(P, list(children)) == P


@pytest.mark.parametrize(
    "law,quoted",
    [
        (argmax_draft_with_q(P, Q), [0.45, 0.25, 0.30, 0.00]),
        (residual_is_p(P, Q), [0.45, 0.15, 0.25, 0.15]),
        (sampled(P, Q, 2, False, raw_q=True), [0.508, 0.100, 0.292, 0.100]),
        (pruned(P, Q), [0.464, 0.179, 0.278, 0.079]),
    ],
)
def test_wrong_verifiers_give_the_quoted_laws(law, quoted):
    assert sum(law) == 1 and law != P
    assert [float(v) for v in law] == pytest.approx(quoted, abs=6e-4)


@pytest.mark.parametrize("widths", [[1, 1], [1, 1, 1], [2, 1], [2, 2], [3, 2], [1, 3]])
def test_two_levels_give_the_plain_law(widths):
    rng = random.Random(str(widths))

    def law():
        weights = [rng.randrange(0, 6) for _ in range(3)]
        weights[rng.randrange(3)] += 1
        return [Fraction(w, sum(weights)) for w in weights]

    target, draft = ({prefix: law() for prefix in prefixes(3, 3)} for _ in range(2))
    want = plain(target, (), 3)
    got = speculated(target, draft, (), widths, 3)
    assert {k: v for k, v in got.items() if v} == {k: v for k, v in want.items() if v}
