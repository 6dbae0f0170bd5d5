"""Batches: texts of like length side by side, and which of their slots are to learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specrt.train.samples import Sample
from specrt.train.target import PAGE

_WINDOW = 4096  # texts sorted by length at a time, so that the order stays near random


@dataclass
class Batch:
    """ids int64 [B, T], texts padded at their ends. slots int64 [N]: places in B x T of the slots whose next word, token slot + 2, is the answer's; they stand text by text, and
    the target's row at slot + 1 says what they should. left int64 [N]: such rows from this one to its text's end, itself included."""

    ids: Tensor
    slots: Tensor
    left: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in (self.ids, self.slots, self.left)))


def padded(length: int) -> int:
    return -(-length // PAGE) * PAGE


def plan(samples: list[Sample], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch as indices of samples, at most ``batch_tokens`` padded positions each (or one text); a function of the arguments alone."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(samples), generator=generator).tolist()
    batches: list[list[int]] = []
    for at in range(0, len(order), _WINDOW):
        batch: list[int] = []
        for i in sorted(order[at : at + _WINDOW], key=lambda i: len(samples[i].ids)):
            if batch and (len(batch) + 1) * padded(len(samples[i].ids)) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def make_batch(samples: list[Sample]) -> Batch:
    width = padded(max(len(s.ids) for s in samples))
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    slots, left = [], []
    for row, s in enumerate(samples):
        ids[row, : len(s.ids)] = torch.tensor(s.ids)
        places = torch.arange(max(s.prompt - 2, 0), len(s.ids) - 2)
        slots.append(row * width + places)
        left.append(len(s.ids) - 2 - places)
    return Batch(ids, torch.cat(slots), torch.cat(left))
