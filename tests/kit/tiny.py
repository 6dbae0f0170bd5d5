"""Tiny random checkpoints of every architecture, on disk (Hugging Face folder or GGUF) or in memory, with a tokenizer of bytes and a few merges."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from specrt.models.config import ModelConfig
from specrt.weights.checkpoint import Checkpoint
from specrt.weights.names import expected_tensors

VOCAB = 300  # more rows than the tokenizer has tokens, as published models do
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d")]
CHAT_TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

_BASE = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "max_position_embeddings": 512, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 2}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# Name -> config.json. Head dims and GQA ratios differ; in qwen3 heads x head_dim is not the hidden size.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2},
    "llama-tied": {**_BASE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "hidden_size": 192, "num_attention_heads": 3},
    "llama3": {**_BASE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0, "rope_scaling": _LLAMA3, "eos_token_id": [2, 0]},
    "llama-linear": {**_BASE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "linear", "factor": 2.0}, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_BASE, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 24, "head_dim": 96},
    "qwen2": {**_BASE, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 256, "num_attention_heads": 4, "tie_word_embeddings": True},
    "qwen2-window": {**_BASE, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {**_BASE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
}


class RandomTensors:
    """A TensorSource of seeded random weights, each a function of (seed, name): the same in memory, in safetensors and in GGUF. Scaled so that activations
    keep their size; nothing is stored, so an 8B shape costs no disk."""

    def __init__(self, config: ModelConfig, seed: int = 0, device: str = "cpu"):
        self._shapes, self._seed, self._device = expected_tensors(config), seed, device

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def storage(self, name: str) -> str:
        return "F32"

    def get(self, name: str) -> Tensor:
        return random_tensor(name, self._shapes[name], self._seed, self._device)


def random_tensor(name: str, shape: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # 32 bits: a CPU generator ignores the rest
    x = torch.randn(shape, generator=generator, device=device)
    if len(shape) == 1 and name.endswith(".weight"):
        return 1 + 0.1 * x
    if name.endswith("embed_tokens.weight"):
        return 0.5 * x
    return 0.1 * x if name.endswith(".bias") else x * shape[1] ** -0.5


class RandomCheckpoint(Checkpoint):
    """A checkpoint of random weights that lies nowhere."""

    def tokenizer(self):
        from specrt.text import Tokenizer

        return Tokenizer(tiny_tokenizer(), origin="random")


def random_checkpoint(config: ModelConfig | str, seed: int = 0, device: str = "cpu") -> Checkpoint:
    """``config``: a ModelConfig of any size, or a name of ``CONFIGS``."""
    config = ModelConfig.from_hf(CONFIGS[config]) if isinstance(config, str) else config
    return RandomCheckpoint("random", Path("."), "random", config, RandomTensors(config, seed, device))


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    source = RandomTensors(config, seed)
    return {name: source.get(name) for name in source.names()}


def tiny_vocab() -> dict[str, int]:
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: i for i, token in enumerate([*SPECIAL, *bytes_, *(a + b for a, b in MERGES)])}


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE over all 256 bytes: encodes any text."""
    tokenizer = Tokenizer(models.BPE(vocab=tiny_vocab(), merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def write_folder(folder: Path, config: dict[str, Any] | str, seed: int = 0, shards: int = 1, form: str = "safetensors", dtype: torch.dtype = torch.float32) -> Path:
    """Writes a Hugging Face folder and returns it. form: "safetensors" or "bin"; shards > 1: several files and an index."""
    config = CONFIGS[config] if isinstance(config, str) else config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype).removeprefix("torch.")}))
    tensors = {name: t.to(dtype) for name, t in random_tensors(ModelConfig.from_hf(config), seed).items()}
    write_weights(folder, tensors, shards, form)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[2], "bos_token": {"content": SPECIAL[0]}, "chat_template": CHAT_TEMPLATE}))
    return folder


def write_weights(folder: Path, tensors: dict[str, Tensor], shards: int = 1, form: str = "safetensors") -> None:
    names = sorted(tensors)
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    files = [f"{stem}.{suffix}"] if shards == 1 else [f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" for i in range(shards)]
    for i, file in enumerate(files):
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, folder / file) if form == "safetensors" else torch.save(part, folder / file)
    if shards > 1:
        weight_map = {n: files[i % shards] for i, n in enumerate(names)}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


_GGUF_NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
               "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
               "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
               "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_GGUF_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest]}.{kind}"


def write_gguf(path: Path, config: dict[str, Any] | str, storage: str = "F32", seed: int = 0, rope_factors: Tensor | None = None, **metadata: Any) -> Path:
    """Writes the checkpoint as llama.cpp's converter would: q and k of llama and mistral permuted, matrices stored as ``storage``
    (a gguf type name; a block must fit the rows), vectors F32. metadata: extra or other string/int/float/list pairs, "." spelt "__"."""
    hf = CONFIGS[config] if isinstance(config, str) else config
    c = ModelConfig.from_hf(hf)
    arch = "llama" if c.architecture == "mistral" else c.architecture
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if c.windows[0]:
        writer.add_sliding_window(c.windows[0])
    if c.rope_scaling and c.rope_scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_scaling["factor"])
    vocab = list(tiny_vocab())
    tokens = vocab + [f"[PAD{i}]" for i in range(len(vocab), c.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocab) - len(SPECIAL)) + [5] * (len(tokens) - len(vocab)))
    writer.add_token_merges([" ".join(m) for m in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array, bool: writer.add_bool}[type(value)]
        add(key.replace("__", "."), value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.float().numpy())
    for name, tensor in random_tensors(c, seed).items():
        data = tensor.numpy()
        heads = c.num_heads if ".q_proj." in name else c.num_kv_heads if ".k_proj." in name else 0
        if arch == "llama" and heads:
            data = numpy.ascontiguousarray(data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape))
        kind = gguf.GGMLQuantizationType[storage if data.ndim == 2 else "F32"]
        stored = data.astype(numpy.float16) if kind.name == "F16" else data if kind.name == "F32" else quantize(data, kind)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(x: numpy.ndarray, kind: gguf.GGMLQuantizationType) -> numpy.ndarray:
    """Rows as stored bytes. The gguf package quantises all types but the K ones; for those any valid bytes will do, so the scales are set and the rest is random."""
    if not kind.name.endswith("_K"):
        return gguf.quantize(x, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = numpy.random.default_rng(zlib.crc32(x.tobytes())).integers(0, 256, (x.shape[0], x.shape[1] // block, size), dtype=numpy.uint8)
    scale = numpy.frombuffer(numpy.float16(1e-4).tobytes(), numpy.uint8)
    raw[..., slice(0, 2) if kind.name == "Q4_K" else slice(208, 210)] = scale
    if kind.name == "Q4_K":
        raw[..., 2:4] = scale
    return raw.reshape(x.shape[0], -1)
