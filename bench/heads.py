"""Draft heads of random weights for a target of any shape, as the published ones of that shape are made; and what a round must read of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specrt.models.config import ModelConfig
from specrt.weights.head import Head, expected_tensors
from specrt.weights.head_config import HeadConfig

DRAFT_VOCABULARY = 32000
_LAYERS = {"eagle": 1, "eagle3": 1, "peagle": 4, "mtp": 1}


class _RandomTensors:
    """A TensorSource of random numbers, made on the device as they are asked for. Draft ids are spread evenly over the target's."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], vocab: int, device: torch.device):
        self._shapes, self._vocab, self._device = shapes, vocab, device

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.int64 if name == "d2t" else torch.float32

    def storage(self, name: str) -> str:
        return "I64" if name == "d2t" else "F32"

    def get(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name == "d2t":
            return torch.arange(shape[0]) * (self._vocab // shape[0] - 1)
        return torch.ones(shape, device=self._device) if len(shape) == 1 else torch.randn(shape, device=self._device) * shape[1] ** -0.5


def random_head(method: str, target: ModelConfig, device: torch.device) -> Head:
    """One of the target's widths: a layer like the target's (four for "peagle"), a draft vocabulary of 32000 for the families that have one."""
    layers = replace(target, num_layers=_LAYERS[method], windows=(), tie_word_embeddings=False)
    own = method in ("eagle3", "peagle")
    config = HeadConfig(method, "random", layers, target.hidden_size, min(DRAFT_VOCABULARY, target.vocab_size // 2) if own else target.vocab_size, own_lm_head=own,
                        norm_output=method == "mtp", mask_token_id=0 if method == "peagle" else None)
    return Head("random", Path("."), config, _RandomTensors(expected_tensors(config)[0], target.vocab_size, device))


def head_bytes(model: Any, depth: int, tensor_bytes: Any) -> int:
    """Of the weights that drafts of ``depth`` and the extension over the accepted rows must read: fc and layers once for the true rows, lm_head once; then both
    again for every further level, which P-EAGLE has in the same pass."""
    layers = sum(tensor_bytes(m) for layer in model.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down))
    passes = 1 if model.config.family == "peagle" else depth
    return tensor_bytes(model.fc) + passes * (layers + tensor_bytes(model.lm_head))
