"""MEDUSA heads of random weights in every published form, and a float64 reading of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.kit.tiny import random_tensor


def medusa_tensors(heads: int = 4, layers: int = 1, hidden: int = 128, vocab: int = 300, bias: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Under the trainer's names: {j}.{b}.linear.*, {j}.{layers}.weight."""
    shapes: dict[str, tuple[int, ...]] = {}
    for j in range(heads):
        for b in range(layers):
            shapes[f"{j}.{b}.linear.weight"] = (hidden, hidden)
            if bias:
                shapes[f"{j}.{b}.linear.bias"] = (hidden,)
        shapes[f"{j}.{layers}.weight"] = (vocab, hidden)
    return {name: random_tensor(name, shape, seed) if len(shape) > 1 else 0.1 * random_tensor(name, shape, seed) for name, shape in shapes.items()}


def converted(tensors: dict[str, Tensor], layers: int = 1, prefix: str = "") -> dict[str, Tensor]:
    """vLLM's names of the same heads."""
    out = {}
    for name, tensor in tensors.items():
        j, b, *rest = name.split(".")
        out[f"{prefix}lm_heads.{j}.weight" if int(b) == layers and rest == ["weight"] else f"{prefix}blocks.{j}.layers.{b}.{rest[-1]}"] = tensor
    return out


def write_medusa(folder: Path, tensors: dict[str, Tensor], file: str = "medusa_lm_head.safetensors", **config: Any) -> Path:
    """config: by default the trainer's, which says 2 heads whatever there are."""
    folder.mkdir(parents=True, exist_ok=True)
    default = {"base_model_name_or_path": "org/target", "medusa_num_heads": 2, "medusa_num_layers": 1, "version": "2"}
    (folder / "config.json").write_text(json.dumps(config or default))
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    save_file(tensors, folder / file) if file.endswith("safetensors") else torch.save(tensors, folder / file)
    return folder


def reference_logits(tensors: dict[str, Tensor], j: int, layers: int, state: Tensor) -> Tensor:
    """Of head j from the final-normed state [.., h]; trainer's names."""
    x = state.double()
    for b in range(layers):
        y = x @ tensors[f"{j}.{b}.linear.weight"].double().T + tensors.get(f"{j}.{b}.linear.bias", torch.zeros(())).double()
        x = x + y / (1 + torch.exp(-y))
    return x @ tensors[f"{j}.{layers}.weight"].double().T
