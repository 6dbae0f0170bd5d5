"""MedusaModel: heads that each guess one further token from the target's last state alone (drafters.md 6)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from specrt import ops
from specrt.layers.linear import Fp8Linear, Linear
from specrt.models.dense import DenseModel
from specrt.weights.fp8 import quantized
from specrt.weights.medusa import MedusaHead


class MedusaModel:
    def __init__(self, head: MedusaHead, target: DenseModel, quantization: str | None = None):
        """Reads the weights; each is rounded to the target's dtype once, or with quantization "fp8" quantised."""
        self.num_heads, self.hidden_size, self.vocab, self.dtype, self.device = head.num_heads, head.hidden_size, head.draft_vocab_size, target.dtype, target.device
        source, names = head.tensors, set(head.tensors.names())

        ids = head.target_ids()
        order = None if ids is None else ids.argsort()

        def linear(name: str, rows: Tensor | None = None) -> Linear | Fp8Linear:
            weight, biases = source.get(f"{name}.weight"), [source.get(f"{name}.bias")] if f"{name}.bias" in names else []
            if rows is not None:
                weight, biases = weight[rows], [b[rows] for b in biases]
            return Fp8Linear([quantized(weight.to(self.device))], biases, self.device) if quantization == "fp8" else Linear([weight], biases, self.dtype, self.device)

        self.blocks = [[linear(f"blocks.{j}.{b}") for b in range(head.num_layers)] for j in range(head.num_heads)]
        self.lm_heads = [linear("lm_head", order)] * head.num_heads if head.shared_lm_head else [linear(f"lm_heads.{j}", order) for j in range(head.num_heads)]
        #: int64 [D], ascending: the target's id of each output of ``logits``; None = the same ids.
        self.target_ids = None if ids is None else ids[order].to(target.device)
        self._norm, self._eps = target.norm, target.config.rms_norm_eps

    def state(self, residual: Tensor, num_rows: Tensor) -> Tensor:
        """What the heads read: the target's residual stream [R, H] after its final norm."""
        out = torch.empty_like(residual)
        ops.rms_norm(residual, self._norm, self._eps, num_rows, out)
        return out

    def logits(self, j: int, state: Tensor, num_rows: Tensor, out: Tensor) -> None:
        """Of head j, which says the token j + 2 behind the state's own; raw, float32 [R, D]."""
        x = state
        for block in self.blocks[j]:
            y = torch.empty_like(x)
            block(x, num_rows, y)
            x = x + silu(y)
        self.lm_heads[j](x, num_rows, out)
