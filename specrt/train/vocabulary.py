"""The draft vocabulary: the tokens that answers are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from specrt.train.samples import Sample


def draft_vocabulary(samples: list[Sample], size: int, vocab_size: int) -> tuple[Tensor, float]:
    """(ascending target ids int64 [size], the share of the answers' tokens that are among them): the most frequent tokens of the answers, of equal ones the lower id."""
    answers = torch.tensor([token for s in samples for token in s.ids[s.prompt :]], dtype=torch.int64)
    count = torch.bincount(answers, minlength=vocab_size)
    ids = count.argsort(descending=True, stable=True)[:size].sort().values
    return ids, coverage(samples, ids)


def coverage(samples: list[Sample], ids: Tensor) -> float:
    answers = torch.tensor([token for s in samples for token in s.ids[s.prompt :]], dtype=torch.int64)
    return float(torch.isin(answers, ids).double().mean())
