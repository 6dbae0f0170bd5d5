"""GGUF files: the config from their metadata, and their tensors under Hugging Face names, dequantised to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from specrt.models.config import MAX_LAYERS, ModelConfig, positive
from specrt.weights.gguf_format import GgufContainer

STORAGE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # "llama" is also what Mistral and SmolLM2 are written as
_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
          "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """One GGUF file: ``metadata`` (key -> Python value), and a TensorSource of its weights."""

    def __init__(self, path: Path):
        self.path = path
        self._container = GgufContainer(path)
        self.metadata: dict[str, Any] = self._container.metadata
        self._tensors = self._container.tensors
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise ValueError(f"{path} is one of {self.metadata['split.count']} pieces of a split GGUF; merge them into one file first")
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"{path}: unknown architecture {self.architecture!r} (general.architecture); supported: {', '.join(ARCHITECTURES)}")
        for name, tensor in self._tensors.items():
            if tensor.type not in STORAGE:
                raise ValueError(f"{path}: tensor '{name}' has quantisation {tensor.type}, which is not supported; supported: {', '.join(STORAGE)}")
        self._gguf_name = {_hf_name(name): name for name in self._tensors if name != _ROPE_FACTORS}
        self.config = self._config()

    def names(self) -> list[str]:
        return list(self._gguf_name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[self._gguf_name[name]].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def storage(self, name: str) -> str:
        return self._tensors[self._gguf_name[name]].type

    def get(self, name: str) -> Tensor:
        """float32, unrounded. llama.cpp's converter permutes the rows of q and k of "llama" models to interleaved RoPE pairs; here they go back."""
        weight = self._container.read(self._gguf_name[name])
        if self.architecture == "llama" and ".q_proj." in name:
            weight = _half_rotation(weight, self.config.num_heads)
        elif self.architecture == "llama" and ".k_proj." in name:
            weight = _half_rotation(weight, self.config.num_kv_heads)
        return torch.from_numpy(numpy.ascontiguousarray(weight))

    # ------------------------------------------------------------------------------------------------ config

    def _value(self, key: str, kind: type, default: Any = None, required: bool = True) -> Any:
        """Metadata ``<architecture>.key``, or ``key`` itself where it has a room of its own ("tokenizer.")."""
        full = key if key.startswith("tokenizer.") else f"{self.architecture}.{key}"
        value = self.metadata.get(full, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # some converters write one entry a layer
        if value is None and not required:
            return None
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{self.path}: metadata '{full}' must be of type {kind.__name__}, " + ("and it is missing" if value is None else f"got {value!r}"))
        if kind is int and value < 0:
            raise ValueError(f"{self.path}: metadata '{full}' must not be negative, got {value}")
        return value

    def _size(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self._value(key, int, default)
        if not 1 <= value <= most:
            raise ValueError(f"{self.path}: metadata '{self.architecture}.{key}' must be >= 1 and <= {most}, got {value}")
        return value

    def _config(self) -> ModelConfig:
        if "model.embed_tokens.weight" not in self._gguf_name:
            raise ValueError(f"{self.path}: tensor 'token_embd.weight' is missing")
        if self._value("expert_count", int, 0):
            raise ValueError(f"{self.path}: '{self.architecture}.expert_count' = {self._value('expert_count', int)}: mixtures of experts are not supported")
        heads, hidden = self._size("attention.head_count"), self._size("embedding_length")
        head_dim = self._size("attention.key_length", max(1, hidden // heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._size(key, head_dim) != head_dim:
                raise ValueError(f"{self.path}: '{self.architecture}.{key}' = {self._size(key)} must equal the head dimension {head_dim}")
        vocab = self.shape("model.embed_tokens.weight")[0]
        if self._size("vocab_size", vocab) != vocab:
            raise ValueError(f"{self.path}: '{self.architecture}.vocab_size' = {self._size('vocab_size')}, but token_embd.weight has {vocab} rows")
        layers, kv_heads = self._size("block_count", most=MAX_LAYERS), self._size("attention.head_count_kv", heads)
        window = self._value("attention.sliding_window", int, 0)
        ends = (self._value(f"tokenizer.ggml.{name}_token_id", int, required=False) for name in ("eos", "eot", "eom"))

        def has(kind: str) -> bool:
            return f"model.layers.0.{kind}" in self._gguf_name

        try:
            return ModelConfig(
                architecture=self.architecture, vocab_size=vocab, hidden_size=hidden, intermediate_size=self._size("feed_forward_length"), num_layers=layers,
                num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
                rms_norm_eps=positive(f"{self.architecture}.attention.layer_norm_rms_epsilon", self._value("attention.layer_norm_rms_epsilon", float)),
                rope_theta=positive(f"{self.architecture}.rope.freq_base", self._value("rope.freq_base", float, 10000.0)),
                rope_scaling=self._rope_scaling(head_dim), max_position_embeddings=self._size("context_length"),
                tie_word_embeddings="lm_head.weight" not in self._gguf_name, windows=(window,) * layers, attention_bias=has("self_attn.q_proj.bias"),
                o_bias=has("self_attn.o_proj.bias"), mlp_bias=has("mlp.gate_proj.bias"), qk_norm=self.architecture == "qwen3",
                bos_token_id=self._value("tokenizer.ggml.bos_token_id", int, required=False),
                eos_token_ids=tuple(dict.fromkeys(e for e in ends if e is not None)))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        if _ROPE_FACTORS in self._tensors:
            factors = self._container.read(_ROPE_FACTORS).reshape(-1)
            if factors.size != head_dim // 2 or not (numpy.isfinite(factors) & (factors > 0)).all():
                raise ValueError(f"tensor '{_ROPE_FACTORS}' must hold {head_dim // 2} finite numbers > 0, got {factors.size} numbers")
            return {"rope_type": "factors", "factors": tuple(float(f) for f in factors)}
        kind = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind != "linear":
            raise ValueError(f"'{self.architecture}.rope.scaling.type' = {kind!r} is not supported; supported: none, linear")
        key = f"{self.architecture}.rope.scaling.factor"
        return {"rope_type": "linear", "factor": positive(key, self.metadata.get(key))}


def _hf_name(name: str) -> str:
    """The Hugging Face name of a tensor; an unknown one keeps its own, and the check of names refuses it."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    if stem.startswith("blk.") and rest in _LAYER:
        return f"model.layers.{block}.{_LAYER[rest]}.{kind}"
    return name


def _half_rotation(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows of each head from pairs (x0, y0, x1, y1, ...) to halves (x0, x1, ..., y0, y1, ...)."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
