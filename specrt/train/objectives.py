"""Objectives: from what each slot says at each step, against what the target says, to a loss.

Rows are slots whose next tokens belong to an answer; row k at step s is compared with the target's row k + s of the same text. Of a row: its soft cross entropy with the target's
distribution over the head's vocabulary, and alpha = sum min(p, q), the probability that exact sampling accepts the draft, with p the target's whole distribution. (Of vsd, the rows are those of chains that the head draws by itself: chains.py.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

_LK_DECAY = 3.0  # eta of arXiv:2602.23881


@dataclass
class StepRows:
    """One step over N rows: cross entropy and alpha (0 where not ``counted``), whether the likeliest token is the target's; counted: the target's row is of the text;
    taught: and its likeliest token is one the head can say."""

    ce: Tensor
    alpha: Tensor
    hit: Tensor
    counted: Tensor
    taught: Tensor


def row_scores(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ce, alpha, hit) of rows [N, D]; teacher: float32 log-probabilities of the target's whole distribution."""
    return (_fused_scores() if logits.is_cuda else _scores)(logits, teacher)


def _scores(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logq = log_softmax(logits.float(), -1)
    ce = -(torch.softmax(teacher, -1) * logq).sum(-1)
    return ce, torch.minimum(teacher.exp(), logq.exp()).sum(-1), logits.argmax(-1) == teacher.argmax(-1)


@cache
def _fused_scores() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A few passes over [N, D] instead of a dozen, the most of a training step. Made when first used: torch.compile takes two seconds to import."""
    return torch.compile(_scores, dynamic=True)


def loss_of(objective: str, steps: list[StepRows], decay: float) -> Tensor:
    """ce: soft cross entropy, step s weighted decay^s. lk: of each step, w ce + (1 - w)(1 - alpha) with w = exp(-3 alpha): first towards the target, then towards being
    accepted. length: the same of whole chains, with 1 - E[accepted tokens] / S in place of 1 - alpha, where E = sum over s of alpha_0 ... alpha_s."""
    ce = [_mean(s.ce, s.taught) for s in steps]
    alpha = [_mean(s.alpha, s.counted) for s in steps]
    weights = [decay**i for i in range(len(steps))]
    if objective == "ce":
        return sum(w * x for w, x in zip(weights, ce))
    near = [torch.exp(-_LK_DECAY * a.detach()) for a in alpha]
    if objective == "lk":
        return sum(w * (n * x + (1 - n) * (1 - a)) for w, n, x, a in zip(weights, near, ce, alpha))
    alive, expected = torch.ones_like(steps[0].alpha), torch.zeros_like(steps[0].alpha)
    for s in steps:
        alive = alive * s.alpha
        expected = expected + alive
    chain = 1 - _mean(expected, steps[0].counted) / len(steps)
    return sum(w * n * x for w, n, x in zip(weights, near, ce)) + (1 - near[0]) * len(steps) * chain


def accepted_lengths(logq: Tensor, logp: Tensor) -> Tensor:
    """How many tokens of a chain the ratio test is expected to accept: [...], from log-probabilities [..., S] of them, the sum over i of min(1, p_1 / q_1) ... min(1, p_i / q_i)."""
    return (logp - logq).clamp(max=0).cumsum(-1).exp().sum(-1)


def vsd_loss(logq: Tensor, logp: Tensor, ce: Tensor) -> Tensor:
    """Variational speculative decoding, by its practical surrogate (training.md 8): of N places C chains of S tokens drawn from the head; logq, logp [N, C, S]: log-probabilities of
    their tokens for head and target, ce: soft cross entropy at the nodes they visit. -sum w log q(chain), w the softmax of the accepted lengths of a place's chains, plus the
    cross entropy (KL(p || q) but for a constant). 1 / C is taken off w: the expected gradient stays, since that of log q is 0, and has less noise."""
    w = torch.softmax(accepted_lengths(logq.detach(), logp), -1)
    return (ce.sum(-1).mean(-1) - ((w - 1 / w.shape[-1]) * logq.sum(-1)).sum(-1)).mean()


def _mean(x: Tensor, where: Tensor) -> Tensor:
    return (x * where).sum() / where.sum().clamp_min(1)
