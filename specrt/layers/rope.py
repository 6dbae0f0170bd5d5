"""RoPE tables: cos and sin of every position, with the checkpoint's frequency scaling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """float32 [head_dim/2]: theta^(-2i/head_dim), scaled as ``ModelConfig.rope_scaling`` says.

    In float32 throughout, as the models were trained: at position 8000 the last bit of a frequency is worth 5e-4 of a radian.
    llama3 (Llama 3.1): wavelengths above original/low_freq_factor are stretched by ``factor``, those below original/high_freq_factor are
    kept, between them the two frequencies are blended linearly in original/wavelength."""
    inv = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if scaling is None:
        return inv
    kind = scaling["rope_type"]
    if kind == "linear":
        return inv / scaling["factor"]
    if kind == "factors":
        return inv / torch.tensor(scaling["factors"], dtype=torch.float32)
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; supported: linear, llama3, factors")
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / inv)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * inv / factor + kept * inv


def rope_tables(head_dim: int, theta: float, scaling: dict[str, Any] | None, positions: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [positions, head_dim/2]. Computed on the CPU, so that every device has the same bits."""
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(head_dim, theta, scaling)
    return angle.cos().to(device), angle.sin().to(device)
