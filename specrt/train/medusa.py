"""MedusaNetwork: MEDUSA heads under autograd; step s is head s, which reads the target's last state alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from specrt.train.network import rms_norm
from specrt.weights.medusa import MedusaHead


class MedusaNetwork(nn.Module):
    """Parameters have the names of weights/medusa.py."""

    def __init__(self, head: MedusaHead, target_norm: Tensor, target_eps: float):
        super().__init__()
        self.num_heads, self.target_eps, h, d = head.num_heads, target_eps, head.hidden_size, head.draft_vocab_size
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(h, h, head.bias) for _ in range(head.num_layers)) for _ in range(head.num_heads))
        if head.shared_lm_head:
            self.lm_head = nn.Linear(h, d, bias=False)
        else:
            self.lm_heads = nn.ModuleList(nn.Linear(h, d, bias=False) for _ in range(head.num_heads))
        self.register_buffer("target_norm", target_norm, persistent=False)
        self.load_state_dict({name: head.tensors.get(name).float() for name in self.state_dict()})

    def precondition(self, features: Tensor, new: bool) -> None:
        """Normed states need none."""

    def published(self) -> dict[str, Tensor]:
        return self.state_dict()

    def unroll(self, ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        """As HeadNetwork's; at most ``num_heads`` steps."""
        state = rms_norm(features, self.target_norm, self.target_eps)
        for blocks in list(self.blocks)[:steps]:
            x = state
            for block in blocks:
                x = x + silu(block(x))
            yield x

    def logits(self, hidden: Tensor, step: int) -> Tensor:
        head = self.lm_head if hasattr(self, "lm_head") else self.lm_heads[step]
        return torch.nn.functional.linear(hidden, head.weight.to(hidden.dtype))
