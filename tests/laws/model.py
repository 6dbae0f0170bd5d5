"""The verifiers of one position as exact laws over rational numbers: every draft outcome is enumerated and every coin integrated.

A law is a list of Fractions, P(emitted token = v). ``p`` is the target's, ``q`` the drafter's. Each function is a verifier of verification.md, or a wrong one
that a test must catch."""

from fractions import Fraction
from itertools import product

Law = list[Fraction]

P = [Fraction(n, 10) for n in (5, 1, 3, 1)]
Q = [Fraction(n, 10) for n in (2, 4, 1, 3)]


def normalised(weights: Law) -> Law:
    total = sum(weights)
    return [w / total for w in weights] if total else weights


def residual(p: Law, q: Law) -> Law:
    return normalised([max(a - b, Fraction(0)) for a, b in zip(p, q)])


def without(q: Law, x: int) -> Law:
    return normalised([Fraction(0) if v == x else w for v, w in enumerate(q)])


def mix(parts: list[tuple[Fraction, Law]]) -> Law:
    return [sum(weight * law[v] for weight, law in parts) for v in range(len(parts[0][1]))]


def point(x: int, size: int) -> Law:
    return [Fraction(v == x) for v in range(size)]


def ratio(p: Law, q: Law, x: int, rejected: Law) -> Law:
    """Accepts x with min(1, p/q), else emits from ``rejected``."""
    accept = min(Fraction(1), p[x] / q[x]) if q[x] else Fraction(1)
    return mix([(accept, point(x, len(p))), (1 - accept, rejected)])


def multi_round(p: Law, q: Law, drafts: list[int], replace: bool, raw_q: bool = False) -> Law:
    """The law of the emitted token given the drafts. ``raw_q`` (wrong) keeps q as it was after a draw without replacement."""
    if not drafts:
        return p
    x, rest = drafts[0], drafts[1:]
    after = multi_round(residual(p, q), q if replace or raw_q else without(q, x), rest, replace, raw_q)
    return ratio(p, q, x, after)


def draws(q: Law, m: int, replace: bool) -> list[tuple[Fraction, list[int]]]:
    """Every ordered draw of m tokens from q (fewer where no more are possible), with its probability."""
    if m == 0 or not any(q):
        return [(Fraction(1), [])]
    return [(q[x] * w, [x, *rest]) for x in range(len(q)) if q[x] for w, rest in draws(q if replace else without(q, x), m - 1, replace)]


def sampled(p: Law, q: Law, m: int, replace: bool, raw_q: bool = False) -> Law:
    return mix([(w, multi_round(p, q, xs, replace, raw_q)) for w, xs in draws(q, m, replace)])


def target_only(p: Law, children: list[int]) -> Law:
    """verification.md 3 (b)."""
    if not children:
        return p
    x = children[0]
    return mix([(p[x], point(x, len(p))), (1 - p[x], target_only(without(p, x), children[1:]))])


# ------------------------------------------------------------------------------------------------ wrong ones


def argmax_draft_with_q(p: Law, q: Law) -> Law:
    """The draft is argmax q, verified as if it had been sampled from q."""
    return ratio(p, q, q.index(max(q)), residual(p, q))


def residual_is_p(p: Law, q: Law) -> Law:
    return mix([(q[x], ratio(p, q, x, p)) for x in range(len(p)) if q[x]])


def pruned(p: Law, q: Law) -> Law:
    """Of two drafts without replacement the one with the higher q is kept, and verified as if it had been the only draw."""
    return mix([(w, multi_round(p, q, [max(xs, key=lambda x: q[x])], False)) for w, xs in draws(q, 2, False)])


# ------------------------------------------------------------------------------------------------ sequences

Model = dict[tuple[int, ...], Law]  # prefix -> next-token law


def plain(model: Model, prefix: tuple[int, ...], length: int) -> dict[tuple[int, ...], Fraction]:
    """Law of the next tokens of plain sampling, up to ``length`` in all."""
    if len(prefix) == length:
        return {prefix: Fraction(1)}
    out: dict[tuple[int, ...], Fraction] = {}
    for v, w in enumerate(model[prefix]):
        for sequence, u in plain(model, prefix + (v,), length).items():
            out[sequence] = out.get(sequence, Fraction(0)) + w * u
    return out


def speculated(target: Model, draft: Model, prefix: tuple[int, ...], widths: list[int], length: int) -> dict[tuple[int, ...], Fraction]:
    """Law of the next tokens when each level of the main path draws ``widths[d]`` children without replacement (first children carry on), then plain sampling."""
    out: dict[tuple[int, ...], Fraction] = {}
    if not widths:
        return plain(target, prefix, length)
    p, q = target[prefix], draft[prefix]
    for w, xs in draws(q, widths[0], False):
        accepted_first = min(Fraction(1), p[xs[0]] / q[xs[0]])
        other = multi_round(residual(p, q), without(q, xs[0]), xs[1:], False) if accepted_first < 1 else p
        branches = [(accepted_first, xs[0], widths[1:])] + [((1 - accepted_first) * u, v, []) for v, u in enumerate(other)]
        for weight, v, deeper in branches:
            if weight:
                for sequence, u in speculated(target, draft, prefix + (v,), deeper, length).items():
                    out[sequence] = out.get(sequence, Fraction(0)) + w * weight * u
    return out


def prefixes(size: int, length: int) -> list[tuple[int, ...]]:
    return [prefix for n in range(length) for prefix in product(range(size), repeat=n)]
