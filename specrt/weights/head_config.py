"""HeadConfig: what an EAGLE head or MTP module is, read from the config.json of any of its formats (EAGLE, SpecForge, MiMo, speculators)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from specrt.models.config import ModelConfig, Reader, architecture_names

# What speculators call their other algorithms.
_OTHER_ALGORITHMS = {"dflash": "DFlash", "dspark": "DSpark"}


@dataclass(frozen=True)
class HeadConfig:
    """family: the method: "eagle" (EAGLE-1, whose weights EAGLE-2 uses too), "eagle3" (3.1 included), "peagle" (EAGLE-3's network, all drafts in one pass) or "mtp" (a
    multi-token-prediction module as MiMo's). layers: the head's decoder layers; its vocab_size is the *target's*, its hidden size the head's. layer_ids: residual-stream
    boundaries to capture, None = the default for the target (``boundaries``); ids_read: how they were read.

    eagle3, peagle: use_aux (False: the only feature is the target's final-normed state, and there is no fc), num_aux boundaries of target_hidden_size each. Flags as in
    drafters.md 3 and 4: norm_before_residual, fc_norm, norm_before_fc, norm_output. eagle: input_norms (HASS: norms on embedding and feature before fc). mtp: embedding_first
    (input_proj's columns; speculators, after Qwen), else the feature is first (MiMo). peagle: mask_token_id, None where the config does not say. verifier, verifier_architectures, suggested_tokens: what a speculators config says of its target and draft length."""

    family: str
    form: str
    layers: ModelConfig
    target_hidden_size: int
    draft_vocab_size: int
    own_lm_head: bool
    tie_word_embeddings: bool = False
    fc_bias: bool = False
    input_norms: bool = False
    embedding_first: bool = False
    use_aux: bool = True
    num_aux: int = 3
    layer_ids: tuple[int, ...] | None = None
    ids_read: str = "the default [2, L/2, L-3]"
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    mask_token_id: int | None = None
    verifier: str | None = None
    verifier_architectures: tuple[str, ...] = ()
    suggested_tokens: int | None = None

    @property
    def like_eagle3(self) -> bool:
        """EAGLE-3's network."""
        return self.family in ("eagle3", "peagle")

    @property
    def fc_inputs(self) -> int:
        """Input columns of fc, 0 without one."""
        if not self.like_eagle3:
            return self.layers.hidden_size + self.target_hidden_size
        return self.num_aux * self.target_hidden_size if self.use_aux else 0

    @property
    def final_feature(self) -> bool:
        """The feature is the target's final-normed state instead of boundaries as they are."""
        return not self.like_eagle3 or not self.use_aux

    def boundaries(self, target_layers: int) -> tuple[int, ...]:
        """The residual-stream boundaries (j: what enters layer j, L: what leaves the last) that the head wants of a target with L layers."""
        if self.final_feature:
            return (target_layers,)
        return self.layer_ids or (2, target_layers // 2, target_layers - 3)


def head_config(raw: Any, shapes: dict[str, tuple[int, ...]]) -> HeadConfig:
    """raw: config.json; shapes: of the head's tensors under their canonical names (head.py), which are believed where the config is silent.

    ValueError names the key or tensor that is not valid or not supported."""
    if not isinstance(raw, dict):
        raise ValueError(f"config.json must hold an object, got {type(raw).__name__}")
    _refuse_others(raw)
    speculators = "speculators_model_type" in raw or "speculators_config" in raw
    inner = raw.get("transformer_layer_config") if speculators else raw.get("model") if raw.get("model_type") == "eagle" else raw
    if not isinstance(inner, dict):
        raise ValueError(f"{'transformer_layer_config' if speculators else 'model'} must be an object, got {inner!r:.100}")
    if raw.get("speculators_model_type") == "mtp" or (not speculators and "token_layernorm.weight" in shapes):
        config = _mtp(inner, shapes, speculators)
        return _with_speculators(config, raw) if speculators else config
    layers = _layers(inner, shapes)
    form = "speculators" if speculators else "SpecForge" if "LlamaForCausalLMEagle3" in architecture_names(raw) else "EAGLE"
    family = _family(layers.hidden_size, shapes)
    if family == "eagle3" and (raw.get("speculators_model_type") == "peagle" or "mask_hidden" in shapes):
        family = "peagle"
    draft_vocab = next((v for key in ("draft_vocab_size", "truncated_vocab_size") if (v := Reader(raw).integer(key, optional=True)) is not None), layers.vocab_size)
    common = dict(family=family, form=form, layers=layers, draft_vocab_size=draft_vocab, own_lm_head="lm_head.weight" in shapes,
                  tie_word_embeddings=Reader(raw).boolean("tie_word_embeddings", False), fc_bias="fc.bias" in shapes)
    if family == "eagle":
        return _eagle(common, {**inner, **raw})
    config = _eagle3(common, raw, shapes, speculators)
    return _with_speculators(config, raw) if speculators else config


def _refuse_others(raw: dict[str, Any]) -> None:
    kind = raw.get("speculators_model_type")
    if isinstance(kind, str) and kind in _OTHER_ALGORITHMS:
        raise ValueError(f"this is a {_OTHER_ALGORITHMS[kind]} head, which is not supported yet; supported: EAGLE, EAGLE-3, P-EAGLE, MTP")
    if kind not in (None, "eagle3", "peagle", "mtp"):
        raise ValueError(f"speculators_model_type = {kind!r} is not supported; supported: 'eagle3', 'peagle', 'mtp'")


def _family(hidden: int, shapes: dict[str, tuple[int, ...]]) -> str:
    """By the tensors: architecture names of heads say nothing."""
    query, fc = shapes.get("layers.0.self_attn.q_proj.weight"), shapes.get("fc.weight")
    if query is None:
        raise ValueError("tensor 'layers.0.self_attn.q_proj.weight' (or midlayer.*) is missing: no EAGLE head")
    if query[-1] == 2 * hidden or "layers.0.hidden_norm.weight" in shapes:
        return "eagle3"
    if query[-1] == hidden and fc is not None:
        return "eagle"
    raise ValueError(f"neither an EAGLE nor an EAGLE-3 head: 'layers.0.self_attn.q_proj.weight' has {query[-1]} input columns; with hidden_size {hidden} it must be "
                     f"{hidden} (EAGLE, which also has 'fc.weight') or {2 * hidden} (EAGLE-3)")


def _layers(inner: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """The decoder layers: biases and head norms by the tensors, sliding windows by layer_types whatever the architecture."""
    given = {key: value for key, value in inner.items() if key not in ("architectures", "bos_token_id", "eos_token_id", "text_config", "tie_word_embeddings", "layer_types")}
    if given.get("model_type") in (None, "eagle", "eagle3"):
        given["model_type"] = "llama"
    given.setdefault("num_hidden_layers", 1)
    config = ModelConfig.from_hf(given)
    has = {key: f"layers.0.{name}" in shapes for key, name in [("attention_bias", "self_attn.q_proj.bias"), ("o_bias", "self_attn.o_proj.bias"),
                                                               ("mlp_bias", "mlp.gate_proj.bias"), ("qk_norm", "self_attn.q_norm.weight")]}
    kinds = inner.get("layer_types")
    if kinds is None:
        return replace(config, **has)
    if not isinstance(kinds, list) or len(kinds) != config.num_layers or any(k not in ("full_attention", "sliding_attention") for k in kinds):
        raise ValueError(f"layer_types must list 'full_attention' or 'sliding_attention' for each of the {config.num_layers} layers, got {kinds!r:.200}")
    window = Reader(inner).integer("sliding_window") if "sliding_attention" in kinds else 0
    return replace(config, **has, windows=tuple(window if k == "sliding_attention" else 0 for k in kinds))


def _mtp(inner: dict[str, Any], shapes: dict[str, tuple[int, ...]], speculators: bool) -> HeadConfig:
    """One decoder layer of the target's kind, whose config says how many layers and of which types the *target* has."""
    layers = _layers({key: value for key, value in inner.items() if key not in ("num_hidden_layers", "layer_types")}, shapes)
    return HeadConfig("mtp", "speculators" if speculators else "MiMo", layers, layers.hidden_size, layers.vocab_size, own_lm_head=False, norm_output=True, embedding_first=speculators)


def _eagle(common: dict[str, Any], raw: dict[str, Any]) -> HeadConfig:
    if raw.get("layernorms"):
        raise ValueError("layernorms = true (norms around the head of the old speculators format) is not supported; it must be false or absent")
    hidden = common["layers"].hidden_size
    flag = next((key for key in ("bias", "eagle_fc_bias", "fusion_bias") if key in raw), None)
    if flag is not None and Reader(raw).boolean(flag, True) != common["fc_bias"]:
        raise ValueError(f"{flag} = {str(raw[flag]).lower()}, but tensor 'fc.bias' is {'there' if common['fc_bias'] else 'missing'}")
    return HeadConfig(**common, target_hidden_size=Reader(raw).integer("target_hidden_size", hidden), input_norms=Reader(raw).boolean("add_para_norm", False))


def _eagle3(common: dict[str, Any], raw: dict[str, Any], shapes: dict[str, tuple[int, ...]], speculators: bool) -> HeadConfig:
    nested = raw.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"eagle_config must be an object, got {nested!r:.100}")
    read, inside = Reader(raw), Reader(nested)
    ids, how = _layer_ids(raw, nested, speculators)
    chunks = sum(name.startswith("fc_norm.") for name in shapes)
    fc_norm = read.boolean("fc_norm", False) or read.boolean("use_aux_norm", False) or chunks > 0
    norm_before_fc = read.boolean("norm_before_fc", False) or inside.boolean("norm_before_fc", False) or "input_norm.weight" in shapes
    if fc_norm and norm_before_fc:
        raise ValueError("fc_norm (a norm for each captured chunk) and norm_before_fc (one norm over all of them) exclude each other")
    use_aux = inside.boolean("use_aux_hidden_state", True)
    hidden = common["layers"].hidden_size
    num_aux = read.integer("num_aux_hidden_states", len(ids) if ids else 3)
    if ids and len(ids) != num_aux:
        raise ValueError(f"num_aux_hidden_states = {num_aux}, but eagle_aux_hidden_state_layer_ids lists {len(ids)}")
    config = HeadConfig(**common, target_hidden_size=hidden, use_aux=use_aux, num_aux=num_aux, layer_ids=ids, ids_read=how, fc_norm=fc_norm, norm_before_fc=norm_before_fc,
                        norm_before_residual=read.boolean("norm_before_residual", speculators and common["family"] == "eagle3"), norm_output=read.boolean("norm_output", False),
                        mask_token_id=_mask_token(raw) if common["family"] == "peagle" else None)
    if config.family == "peagle" and not use_aux:
        raise ValueError("use_aux_hidden_state = false does not go with a P-EAGLE head, whose mask_hidden stands for captured layers")
    width = read.integer("target_hidden_size", optional=True)
    if width is None and use_aux and "fc.weight" in shapes and shapes["fc.weight"][-1] % num_aux == 0:
        width = shapes["fc.weight"][-1] // num_aux  # the tensor knows
    return replace(config, target_hidden_size=width or hidden)


def _mask_token(raw: dict[str, Any]) -> int | None:
    block = raw.get("dflash_config")
    found = [block.get("mask_token_id")] if isinstance(block, dict) else []
    found += [raw.get(key) for key in ("mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")]
    mask = next((value for value in found if value is not None), None)
    if mask is not None and (isinstance(mask, bool) or not isinstance(mask, int) or mask < 0):
        raise ValueError(f"mask_token_id must be a token id, got {mask!r:.100}")
    return mask


def _layer_ids(raw: dict[str, Any], nested: dict[str, Any], speculators: bool) -> tuple[tuple[int, ...] | None, str]:
    """Boundaries, and how they were read. A top-level key holds boundaries; eagle_config's ids are outputs of layers (boundary id + 1) if the first is 1, the mark of
    the trainers that count so, and boundaries otherwise."""
    key = "eagle_aux_hidden_state_layer_ids"
    ids = raw.get(key)
    inside = ids is None
    ids = nested.get(key) if inside else ids
    if ids is None:
        return None, HeadConfig.ids_read
    if not isinstance(ids, list) or not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"{key} must be a list of integers, got {ids!r:.100}")
    if inside and not speculators and ids[0] == 1:
        return tuple(i + 1 for i in ids), f"eagle_config's {ids}, outputs of layers: + 1"
    return tuple(ids), f"{'eagle_config' if inside else 'config'}'s {ids}, boundaries"


def _with_speculators(config: HeadConfig, raw: dict[str, Any]) -> HeadConfig:
    """What speculators_config says. ValueError if it asks for lossy acceptance."""
    given = raw.get("speculators_config") or {}
    methods = given.get("proposal_methods") if isinstance(given, dict) else None
    verifier = given.get("verifier") if isinstance(given, dict) else None
    method = methods[0] if isinstance(methods, list) and methods and isinstance(methods[0], dict) else {}
    for key, exact in (("verifier_accept_k", 1), ("accept_tolerance", 0)):
        if method.get(key, exact) not in (None, exact):
            raise ValueError(f"speculators_config: {key} = {method[key]!r} asks for lossy acceptance, and verification here is exact; it must be {exact}")
    tokens = method.get("speculative_tokens")
    verifier = verifier if isinstance(verifier, dict) else {}
    name = verifier.get("name_or_path")
    return replace(config, verifier=name if isinstance(name, str) and name else None, verifier_architectures=tuple(architecture_names(verifier)),
                   suggested_tokens=tokens if isinstance(tokens, int) else None)
