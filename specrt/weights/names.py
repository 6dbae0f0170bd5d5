"""Which tensors a dense model must have, under their Hugging Face names, and the check of a checkpoint against that list."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from specrt.models.config import ModelConfig
from specrt.weights.source import TensorSource

# Buffers that old exports stored: computed here, never read.
BUFFERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$|\.attention\.(bias|masked_bias)$")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model. ``lm_head.weight`` is there only if the head is the model's own."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size), "model.norm.weight": (c.hidden_size,)}
    for i in range(c.num_layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (c.hidden_size,)
        shapes |= layer_tensors(c, f"model.layers.{i}.", c.hidden_size)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def layer_tensors(config: ModelConfig, prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a decoder layer's tensors but for its input norm. ``width``: of what q, k and v are made of."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {prefix + "post_attention_layernorm.weight": (c.hidden_size,)}
    for name, out, columns, bias in [
        ("self_attn.q_proj", q, width, c.attention_bias), ("self_attn.k_proj", kv, width, c.attention_bias), ("self_attn.v_proj", kv, width, c.attention_bias),
        ("self_attn.o_proj", c.hidden_size, q, c.o_bias), ("mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
        ("mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias), ("mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias)]:
        shapes[f"{prefix}{name}.weight"] = (out, columns)
        if bias:
            shapes[f"{prefix}{name}.bias"] = (out,)
    if c.qk_norm:
        shapes[prefix + "self_attn.q_norm.weight"] = shapes[prefix + "self_attn.k_norm.weight"] = (c.head_dim,)
    return shapes


def check_tensors(config: ModelConfig, tensors: TensorSource, origin: str) -> None:
    """ValueError if a tensor is missing, unexpected, of another shape than the config says, or quantised. Reads headers only."""
    expected = expected_tensors(config)
    stored = {name for name in tensors.names() if not BUFFERS.search(name)}
    if config.tie_word_embeddings:
        stored.discard("lm_head.weight")  # a copy of the embedding
    missing, unexpected = sorted(expected.keys() - stored), sorted(stored - expected.keys())
    if missing:
        raise ValueError(f"{origin}: {len(missing)} tensors of this {config.architecture} model are missing: {some(missing)}"
                         + (f" (and {len(unexpected)} are unexpected: {some(unexpected)})" if unexpected else ""))
    if unexpected:
        raise ValueError(f"{origin}: {len(unexpected)} tensors do not belong to this {config.architecture} model: {some(unexpected)}")
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            raise ValueError(f"{origin}: tensor '{name}' has shape {list(tensors.shape(name))}, but the config says {list(shape)} "
                             f"(vocab_size {config.vocab_size}, hidden_size {config.hidden_size}, intermediate_size {config.intermediate_size}, "
                             f"{config.num_heads} heads and {config.num_kv_heads} KV heads of {config.head_dim})")
        if tensors.dtype(name) not in DTYPES:
            raise ValueError(f"{origin}: tensor '{name}' is {tensors.storage(name)}, which is not supported; it must be float32, float16 or bfloat16")


def some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(f"'{n}'" for n in names[:most]) + (", ..." if len(names) > most else "")
