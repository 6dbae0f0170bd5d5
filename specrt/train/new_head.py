"""A new head for a target: its config and first weights, in the published layouts (checkpoints.md A.5, B.2, C). What is trained is what opening it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specrt.train.settings import Settings
from specrt.weights.checkpoint import Checkpoint

_STD = 0.02
_FLAT = 0.15


def write_new_head(folder: Path, s: Settings, target: Checkpoint, target_ids: Tensor | None) -> None:
    """target_ids: the draft vocabulary, None = the target's."""
    config, tensors = _medusa(s, target, target_ids) if s.method == "medusa" else _mtp(s, target) if s.method == "mtp" else _eagle3(s, target, target_ids)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def output_rows(target: Checkpoint) -> Tensor:
    """The target's lm_head [V, H]."""
    return target.tensors.get("model.embed_tokens.weight" if target.config.tie_word_embeddings else "lm_head.weight")


def _llama(s: Settings, target: Checkpoint) -> dict[str, Any]:
    """A decoder layer of the target's shape."""
    c = target.config
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.hidden_size, "intermediate_size": s.intermediate_size or c.intermediate_size,
              "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim, "num_hidden_layers": s.layers, "rms_norm_eps": c.rms_norm_eps,
              "rope_theta": c.rope_theta, "vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings, "hidden_act": "silu", "tie_word_embeddings": False,
              "attention_bias": False, "torch_dtype": s.dtype}
    if c.rope_scaling is not None and c.rope_scaling["rope_type"] != "factors":  # a GGUF's factors have no key; any angles serve a head that is trained with them
        config["rope_scaling"] = c.rope_scaling
    return config


class _Random:
    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * _STD


def _layer(config: dict[str, Any], at: str, inputs: int, random: _Random) -> dict[str, Tensor]:
    h, i, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes = {"self_attn.q_proj": (q, inputs), "self_attn.k_proj": (kv, inputs), "self_attn.v_proj": (kv, inputs), "self_attn.o_proj": (h, q),
              "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
    layer = {f"{at}{name}.weight": random(*shape) for name, shape in shapes.items()}
    return layer | {f"{at}{name}.weight": torch.ones(h) for name in ("input_layernorm", "post_attention_layernorm")}


def _eagle3(s: Settings, target: Checkpoint, target_ids: Tensor | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """EAGLE-3 and P-EAGLE. lm_head starts as the target's rows, and the norm before it small: a guess that knows nothing yet must not be sure of it (SmolLM2: a first cross entropy
    of 9.6, near log D; 20 with a norm of 1, 31 with the target's)."""
    c, random = target.config, _Random(s.seed)
    h, rows = c.hidden_size, output_rows(target)
    ids = list(s.layer_ids or (2, c.num_layers // 2, c.num_layers - 3))
    width = len(ids) * h
    flags = {name: True for name in ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output") if getattr(s, name)}
    config = _llama(s, target) | {"draft_vocab_size": c.vocab_size if target_ids is None else len(target_ids), "num_aux_hidden_states": len(ids),
                                  "eagle_aux_hidden_state_layer_ids": ids} | flags
    first = "layers.0." if s.method == "peagle" else "midlayer."
    tensors = {"fc.weight": random(h, width), f"{first}hidden_norm.weight": torch.ones(h), "norm.weight": torch.full((h,), _FLAT)}
    for i in range(s.layers):
        tensors |= _layer(config, f"layers.{i}." if i else first, h if i else 2 * h, random)
    if s.fc_norm:
        tensors |= {f"fc_norm.{j}.weight": torch.ones(h) for j in range(len(ids))}
    if s.norm_before_fc:
        tensors["input_norm.weight"] = torch.ones(width)
    if s.method == "peagle":
        config |= {"architectures": ["PEagleDraftModel"], "mask_token_id": s.mask_token_id}
        tensors["mask_hidden"] = random(1, 1, width) / _STD
    tensors["lm_head.weight"] = rows if target_ids is None else rows[target_ids]
    tensors = {name: t.float() for name, t in tensors.items()}
    if target_ids is not None:
        tensors["d2t"] = target_ids - torch.arange(len(target_ids))
        tensors["t2d"] = torch.zeros(c.vocab_size, dtype=torch.bool).index_fill_(0, target_ids, True)
    return config, tensors


def _mtp(s: Settings, target: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A module as MiMo's: q, k and v with a bias."""
    random, at = _Random(s.seed), "model.mtp_layers.0."
    config = _llama(s, target) | {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1, "attention_bias": True}
    h, d = config["hidden_size"], config["head_dim"]
    tensors = _layer(config, at, h, random) | {f"{at}{name}.weight": torch.ones(h) for name in ("token_layernorm", "hidden_layernorm")}
    tensors |= {f"{at}self_attn.{n}_proj.bias": torch.zeros(d * config[f"num_{'attention' if n == 'q' else 'key_value'}_heads"]) for n in "qkv"}
    tensors |= {f"{at}input_proj.weight": random(h, 2 * h), f"{at}final_layernorm.weight": torch.ones(h)}
    return config, tensors


def _medusa(s: Settings, target: Checkpoint, target_ids: Tensor | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Blocks that do nothing yet before the target's lm_head."""
    c, rows = target.config, output_rows(target).float()
    rows = rows if target_ids is None else rows[target_ids]
    config = {"model_type": "medusa", "architectures": ["MedusaModel"], "num_heads": s.unroll, "num_hidden_layers": s.layers, "hidden_size": c.hidden_size,
              "vocab_size": c.vocab_size, "truncated_vocab_size": len(rows), "medusa_fc_bias": True, "original_lm_head": False, "base_model_name_or_path": s.model, "torch_dtype": s.dtype}
    tensors = {f"lm_heads.{j}.weight": rows.clone() for j in range(s.unroll)}
    for j in range(s.unroll):
        for b in range(s.layers):
            tensors |= {f"blocks.{j}.layers.{b}.weight": torch.zeros(c.hidden_size, c.hidden_size), f"blocks.{j}.layers.{b}.bias": torch.zeros(c.hidden_size)}
    return config, tensors if target_ids is None else tensors | {"token_map": target_ids}
