"""Draft heads of random weights in every published form, with the exact names and shapes of checkpoints.md B, and an independent float64 reading of their network."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.kit.tiny import random_tensor, write_weights

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Of a head; defaults fit tests.kit.tiny's "llama" target. draft: size of the draft vocabulary, None = the target's."""

    family: str = "eagle3"
    vocab: int = 300
    hidden: int = 128
    target_hidden: int = 128
    intermediate: int = 160
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    layers: int = 1
    num_aux: int = 3
    draft: int | None = 100
    theta: float = 10000.0
    eps: float = 1e-5
    window: int = 0
    bias: bool = False  # q, k, v
    fc_bias: bool = False
    qk_norm: bool = False
    use_aux: bool = True
    own_embedding: bool = False
    own_lm_head: bool = True
    input_norms: bool = False
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    embedding_first: bool = False  # speculators' MTP


MTP = "model.mtp_layers.0."
MASK = 7  # the mask token of P-EAGLE heads


def layer_prefix(family: str, j: int) -> str:
    return {"eagle3": "midlayer.", "mtp": MTP}.get(family, "layers.0.") if j == 0 else f"layers.{j}."


def head_tensors(s: Shape, seed: int = 0) -> Tensors:
    """Under the original names of the family: midlayer.* (EAGLE-3), layers.0.* (EAGLE, P-EAGLE), model.mtp_layers.0.* (MiMo's MTP)."""
    h, q, kv, i = s.hidden, s.heads * s.head_dim, s.kv_heads * s.head_dim, s.intermediate
    three, mtp = s.family in ("eagle3", "peagle"), s.family == "mtp"
    shapes: dict[str, tuple[int, ...]] = {}
    if mtp:
        shapes = {f"{MTP}{n}.weight": shape for n, shape in (("token_layernorm", (h,)), ("hidden_layernorm", (h,)), ("input_proj", (h, 2 * h)), ("final_layernorm", (h,)))}
    elif s.use_aux:
        shapes["fc.weight"] = (h, s.num_aux * s.target_hidden if three else h + s.target_hidden)
        if s.fc_bias:
            shapes["fc.bias"] = (h,)
    for j in range(s.layers):
        at, width = layer_prefix(s.family, j), 2 * h if three and j == 0 else h
        shapes |= {f"{at}self_attn.{n}_proj.weight": (rows, width) for n, rows in (("q", q), ("k", kv), ("v", kv))}
        if s.bias:
            shapes |= {f"{at}self_attn.{n}_proj.bias": (rows,) for n, rows in (("q", q), ("k", kv), ("v", kv))}
        if s.qk_norm:
            shapes |= {f"{at}self_attn.{n}_norm.weight": (s.head_dim,) for n in "qk"}
        shapes |= {f"{at}self_attn.o_proj.weight": (h, q), f"{at}mlp.gate_proj.weight": (i, h), f"{at}mlp.up_proj.weight": (i, h), f"{at}mlp.down_proj.weight": (h, i),
                   f"{at}post_attention_layernorm.weight": (h,)}
        if three or mtp or j:
            shapes[f"{at}input_layernorm.weight"] = (h,)
        if three and j == 0:
            shapes[f"{at}hidden_norm.weight"] = (h,)
    if s.own_embedding:
        shapes["embed_tokens.weight"] = (s.vocab, h)
    if three:
        shapes["norm.weight"] = (h,)
        if s.own_lm_head:
            shapes["lm_head.weight"] = (s.draft or s.vocab, h)
        if s.fc_norm:
            shapes |= {f"fc_norm.{j}.weight": (s.target_hidden,) for j in range(s.num_aux)}
        if s.norm_before_fc:
            shapes["input_norm.weight"] = (s.num_aux * s.target_hidden,)
    elif s.input_norms:
        shapes |= {"embedding_layernorm.weight": (h,), "hidden_states_layernorm.weight": (s.target_hidden,)}
    tensors = {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}
    if s.family == "peagle":
        tensors["mask_hidden"] = random_tensor("mask_hidden", (1, 1, s.num_aux * s.target_hidden), seed)
    if three and s.draft is not None:
        ids = torch.randperm(s.vocab, generator=torch.Generator().manual_seed(seed))[: s.draft].sort().values
        tensors["d2t"] = ids - torch.arange(s.draft)
        tensors["t2d"] = torch.zeros(s.vocab, dtype=torch.bool).index_fill_(0, ids, True)
    return tensors


def plain_config(s: Shape, **more: Any) -> dict[str, Any]:
    """A Llama config as the EAGLE repositories write it."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "qwen3" if s.qk_norm else "llama", "hidden_size": s.hidden, "intermediate_size": s.intermediate,
            "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "num_hidden_layers": s.layers, "rms_norm_eps": s.eps,
            "vocab_size": s.vocab, "max_position_embeddings": 64, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
            "attention_bias": s.bias} | more


def original_config(s: Shape, ids: list[int] | None = None, **more: Any) -> dict[str, Any]:
    """yuhuili's (EAGLE, EAGLE-3), SpecForge's and MiMo's keys."""
    if s.family == "mtp":
        return plain_config(s, rope_theta=s.theta, num_nextn_predict_layers=1) | ({"model_type": "mimo", "architectures": ["MiMoForCausalLM"]} if s.bias else {}) | more
    if s.family == "eagle":
        return plain_config(s) | ({} if s.fc_bias else {"bias": False}) | ({"add_para_norm": True} if s.input_norms else {}) | (
            {} if s.target_hidden == s.hidden else {"target_hidden_size": s.target_hidden}) | more
    config = plain_config(s) | {"rope_theta": s.theta}
    if s.draft is not None:
        config["draft_vocab_size"] = s.draft
    if s.family == "peagle":
        config["mask_token_id"] = MASK
    if s.target_hidden != s.hidden:
        config["target_hidden_size"] = s.target_hidden
    nested: dict[str, Any] = ({} if s.use_aux else {"use_aux_hidden_state": False}) | ({} if ids is None else {"eagle_aux_hidden_state_layer_ids": ids})
    flags = {name: True for name in ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output") if getattr(s, name)}
    return config | flags | ({"eagle_config": nested} if nested else {}) | more


def speculators_config(s: Shape, ids: list[int] | None = None, verifier: str = "org/target", **more: Any) -> dict[str, Any]:
    """An MTP module's has its target's layers, as many as they are."""
    inner = {k: v for k, v in plain_config(s, rope_theta=s.theta).items() if k not in ("architectures", "tie_word_embeddings")}
    if s.window:
        inner |= {"sliding_window": s.window, "layer_types": ["sliding_attention"] * s.layers}
    said = {"speculators_config": {"algorithm": s.family, "default_proposal_method": "greedy",
                                   "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
                                   "verifier": {"name_or_path": verifier, "architectures": []}}}
    if s.family == "mtp":
        inner |= {"num_hidden_layers": 12, "layer_types": ["full_attention"] * 12, "use_sliding_window": False, "sliding_window": None}
        return {"architectures": ["MTPDraftModel"], "speculators_model_type": "mtp", "speculators_version": "0.5.0", "dtype": "bfloat16", "tie_word_embeddings": False,
                "num_nextn_predict_layers": 1, "transformer_layer_config": inner, **said} | more
    return {"architectures": ["Eagle3DraftModel"], "speculators_model_type": s.family, "speculators_version": "0.5.0", "dtype": "bfloat16", "tie_word_embeddings": False,
            "draft_vocab_size": s.draft or s.vocab, "target_hidden_size": None, "embed_requires_grad": False, "norm_before_residual": s.norm_before_residual,
            "norm_before_fc": s.norm_before_fc, "fc_norm": s.fc_norm, "norm_output": s.norm_output, "eagle_aux_hidden_state_layer_ids": ids, "transformer_layer_config": inner, **said} | more


def write_head(folder: Path, config: dict[str, Any], tensors: Tensors, form: str = "safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, {name: t.contiguous() for name, t in tensors.items()}, form=form)
    return folder


def random_head(folder: Path, s: Shape, ids: list[int] | None = None, seed: int = 0) -> Path:
    """A head in its family's original form, or what of its shape only speculators' has."""
    if s.embedding_first or s.window:
        return write_head(folder, speculators_config(s), {name.removeprefix("model."): t for name, t in head_tensors(s, seed).items()})
    return write_head(folder, original_config(s, ids), head_tensors(s, seed), "bin" if s.family == "eagle" else "safetensors")


@dataclass
class Reference:
    """The network in float64, a slot at a time, straight from the formulas of drafters.md 1, 3, 4 and 7. Tensors under their original names; embedding, lm_head and target_norm:
    the target's, used where the head has none."""

    shape: Shape
    tensors: Tensors
    embedding: Tensor
    lm_head: Tensor
    target_norm: Tensor
    target_eps: float = 1e-5
    scale: float = field(init=False)

    def __post_init__(self):
        self.tensors = {n: t.double() if t.is_floating_point() else t for n, t in self.tensors.items()}
        self.embedding = self.tensors.get("embed_tokens.weight", self.embedding.double())
        self.lm_head, self.target_norm = self.tensors.get("lm_head.weight", self.lm_head.double()), self.target_norm.double()
        self.scale = self.shape.head_dim**-0.5

    def _norm(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + (eps or self.shape.eps)) * weight

    def _rope(self, x: Tensor, position: int) -> Tensor:
        half = self.shape.head_dim // 2
        angle = position * self.shape.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def combine(self, features: list[Tensor]) -> Tensor:
        """The feature of one slot from the target's boundaries [Ht] (EAGLE: one, the last)."""
        s, t = self.shape, self.tensors
        features = [f.double().cpu() for f in features]
        if s.family in ("eagle", "mtp") or not s.use_aux:
            return self._norm(features[0], self.target_norm, self.target_eps)
        if s.fc_norm:
            features = [self._norm(f, t[f"fc_norm.{j}.weight"]) for j, f in enumerate(features)]
        g = torch.cat(features)
        if s.norm_before_fc:
            g = self._norm(g, t["input_norm.weight"])
        return t["fc.weight"] @ g + t.get("fc.bias", 0.0)

    def masked(self, steps: int, token: int, past: list) -> list[Tensor]:
        """Logits of ``steps`` mask slots behind ``past`` (P-EAGLE)."""
        feature, found = self.combine(list(self.tensors["mask_hidden"].view(self.shape.num_aux, -1))), []
        for _ in range(steps):
            logits, _, past = self.slot(token, feature, len(past), past)
            found.append(logits)
        return found

    def slot(self, token: int, feature: Tensor, position: int, past: list) -> tuple[Tensor, Tensor, list]:
        """(logits over the head's vocabulary, the next slot's feature, past with this slot). past: a list of (k, v) by layer, one a slot of the path."""
        s, t = self.shape, self.tensors
        e, three, mtp = self.embedding[token], s.family in ("eagle3", "peagle"), s.family == "mtp"
        if three:
            at = layer_prefix(s.family, 0)
            hidden = self._norm(feature, t[at + "hidden_norm.weight"])
            x, residual = torch.cat([self._norm(e, t[at + "input_layernorm.weight"]), hidden]), hidden if s.norm_before_residual else feature
        elif mtp:
            pair = self._norm(feature, t[MTP + "hidden_layernorm.weight"]), self._norm(e, t[MTP + "token_layernorm.weight"])
            residual = t[MTP + "input_proj.weight"] @ torch.cat(pair[::-1] if s.embedding_first else pair)
            x = self._norm(residual, t[MTP + "input_layernorm.weight"])
        else:
            if s.input_norms:
                e, feature = self._norm(e, t["embedding_layernorm.weight"]), self._norm(feature, t["hidden_states_layernorm.weight"])
            x = residual = t["fc.weight"] @ torch.cat([e, feature]) + t.get("fc.bias", 0.0)
        keys = []
        for j in range(s.layers):
            at = layer_prefix(s.family, j)
            if j:
                x = self._norm(residual, t[at + "input_layernorm.weight"])
            q, k, v = ((t[f"{at}self_attn.{n}_proj.weight"] @ x + t.get(f"{at}self_attn.{n}_proj.bias", 0.0)).view(-1, s.head_dim) for n in "qkv")
            if s.qk_norm:
                q, k = self._norm(q, t[at + "self_attn.q_norm.weight"]), self._norm(k, t[at + "self_attn.k_norm.weight"])
            q, k = self._rope(q, position), self._rope(k, position)
            keys.append((k, v))
            seen = [slot[j] for slot in past] + [(k, v)]
            seen = seen[-s.window :] if s.window else seen
            group = s.heads // s.kv_heads
            attended = []
            for head in range(s.heads):
                ks, vs = torch.stack([a[head // group] for a, _ in seen]), torch.stack([b[head // group] for _, b in seen])
                attended.append(torch.softmax(ks @ q[head] * self.scale, 0) @ vs)
            residual = residual + t[at + "self_attn.o_proj.weight"] @ torch.cat(attended)
            y = self._norm(residual, t[at + "post_attention_layernorm.weight"])
            gate = t[at + "mlp.gate_proj.weight"] @ y
            residual = residual + t[at + "mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * (t[at + "mlp.up_proj.weight"] @ y))
        out = self._norm(residual, t[MTP + "final_layernorm.weight" if mtp else "norm.weight"]) if three or mtp else residual
        return self.lm_head @ out, out if mtp or (three and s.norm_output) else residual, past + [keys]

    def over_target(self, logits: Tensor, vocab: int) -> Tensor:
        """Log-probabilities over the target's ids, -inf outside the draft vocabulary."""
        logp = logits - logits.max() - math.log(float(torch.exp(logits - logits.max()).sum()))
        if "d2t" not in self.tensors:
            return logp
        d2t = self.tensors["d2t"]
        return torch.full((vocab,), -math.inf, dtype=torch.float64).index_copy_(0, torch.arange(len(d2t)) + d2t, logp)
