"""Chains that the head draws by itself at random places of the texts, with what the target says along them: what the objective vsd learns from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from specrt.train.batches import Batch
from specrt.train.network import HeadNetwork
from specrt.train.objectives import row_scores
from specrt.train.target import TargetRows

_PLACES = 4  # of a text
_CHAINS = 8  # of a place
_NODES = 63  # of a tree: ancestors are a word of 64 bits, one of them its sign


def draw_chains(network: HeadNetwork, rows: TargetRows, batch: Batch, features: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(logq, logp, ce) [N, C, steps] as ``vsd_loss`` takes them, at temperature 1. ``rows`` must have read the batch last; features: what it read, in the network's dtype."""
    count = min(_CHAINS, (_NODES - 1) // (steps - 1))
    slots = places(batch, generator)
    tokens, logits = [], []

    def draw(z: Tensor) -> Tensor:
        z = z.float()
        token = torch.multinomial(torch.softmax(z.detach(), -1).flatten(0, 1), 1, generator=generator).view(z.shape[:2])
        tokens.append(token)
        logits.append(z)
        return token if rows.target_ids is None else rows.target_ids[token]

    network.chains(batch.ids, features, slots.repeat_interleave(count, 1), steps, draw)
    own = torch.stack(tokens, 2).unflatten(1, (-1, count))  # [B, places, C, steps]
    said = own if rows.target_ids is None else rows.target_ids[own]
    states = torch.stack([rows.follow(batch.ids, slots[:, i], said[:, i]) for i in range(slots.shape[1])], 1)
    teacher = rows.teach(states.flatten(0, 3))[0]
    z = torch.stack(logits, 2).flatten(0, 2)
    ce, own = row_scores(z, teacher)[0], own.flatten()[:, None]
    found = log_softmax(z, -1).gather(1, own), teacher.gather(1, own), ce
    return tuple(x.view(-1, count, steps) for x in found)


def places(batch: Batch, generator: torch.Generator) -> Tensor:
    """Slots [B, places] of each text whose next token is of an answer, drawn at random, later ones first."""
    b, t = batch.ids.shape
    counts = torch.bincount(batch.slots // t, minlength=b)
    first = counts.cumsum(0) - counts
    nth = (torch.rand(b, _PLACES, generator=generator, device=batch.ids.device) * counts[:, None]).long()
    return (batch.slots[first[:, None] + nth] % t).sort(1, descending=True).values
