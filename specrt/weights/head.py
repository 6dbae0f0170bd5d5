"""open_head: the config and tensors of an EAGLE head or MTP module, from whatever form it was published in, under one set of names.

Canonical names: fc, layers.{i}.* (layer 0 with hidden_norm and, in EAGLE-3, a 2h-wide input), norm, lm_head, embed_tokens, d2t, t2d, and the norms on the inputs: fc_norm.{j},
input_norm (EAGLE-3.1), embedding_layernorm, hidden_states_layernorm (HASS), token_layernorm, hidden_layernorm (MTP, whose input_proj is fc and final_layernorm is norm), mask_hidden (P-EAGLE)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from specrt.weights.checkpoint import locate_folder
from specrt.weights.head_config import HeadConfig, head_config
from specrt.weights.hf import RenamedSource, open_folder_tensors, read_json
from specrt.weights.names import BUFFERS, DTYPES, layer_tensors, some
from specrt.weights.source import TensorSource

_AUX_NORMS = {"aux_norm_low": "fc_norm.0", "aux_norm_mid": "fc_norm.1", "aux_norm_high": "fc_norm.2"}
_KINDS = {"eagle": "EAGLE head", "eagle3": "EAGLE-3 head", "peagle": "P-EAGLE head", "mtp": "MTP module"}
_MTP = re.compile(r"(?:model\.)?mtp_layers\.(\d+)\.(.*)")
_MTP_NAMES = {"input_proj": "fc", "final_layernorm": "norm", "token_layernorm": "token_layernorm", "hidden_layernorm": "hidden_layernorm"}
_PREFIXES = {"midlayer.": "layers.0.", "transformer.": "layers.0.", "fusion_fc.": "fc."}


@dataclass(frozen=True)
class Head:
    """A head whose every tensor's name, shape and dtype has been checked against its config; nothing is loaded yet. origin: what the user named."""

    origin: str
    path: Path
    config: HeadConfig
    tensors: TensorSource

    @property
    def own_embedding(self) -> bool:
        return "embed_tokens.weight" in self.tensors.names()

    @property
    def tied(self) -> bool:
        """Its own embedding is its lm_head."""
        c = self.config
        return c.like_eagle3 and c.tie_word_embeddings and self.own_embedding and not c.own_lm_head

    def overridden(self, layer_ids: tuple[int, ...] | None = None, norm_output: bool | None = None, mask_token_id: int | None = None) -> Head:
        """With what the user knows better than config.json: boundaries; norm_output (no tensor shows it, and some trainers wrote it wrongly); the mask token. ValueError for what
        the head does not have."""
        c, changed = self.config, {}
        if layer_ids is not None:
            if c.final_feature or len(layer_ids) != c.num_aux:
                raise ValueError(f"eagle_aux_hidden_state_layer_ids = {list(layer_ids)}: head {self.origin!r} takes "
                                 + ("the target's last state, not captured layers; leave it out" if c.final_feature else f"{c.num_aux} captured layers"))
            changed |= {"layer_ids": layer_ids, "ids_read": "given"}
        if norm_output is not None:
            if not c.like_eagle3:
                raise ValueError(f"norm_output = {norm_output} has no meaning for head {self.origin!r}, which is no EAGLE-3 head; leave it out")
            changed["norm_output"] = norm_output
        if mask_token_id is not None:
            if c.family != "peagle":
                raise ValueError(f"mask_token_id = {mask_token_id} has no meaning for head {self.origin!r}, which is no P-EAGLE head; leave it out")
            changed["mask_token_id"] = mask_token_id
        return replace(self, config=replace(c, **changed))

    def target_ids(self) -> Tensor | None:
        """int64 [D], ascending: the target's id of each draft token; None where they are the same. (d2t holds offsets.)"""
        if "d2t" not in self.tensors.names():
            return None
        d2t = self.tensors.get("d2t").long()
        return d2t + torch.arange(d2t.numel())


def is_head(folder: Path) -> bool:
    """Whether a folder holds an EAGLE head or MTP module rather than a language model."""
    try:
        raw = read_json(folder / "config.json")
        if isinstance(raw, dict) and ("speculators_model_type" in raw or "speculators_config" in raw):
            return True
        stored = open_folder_tensors(folder).names()
    except ValueError:
        return False
    names = {canonical_name(name) for name in stored}
    return "fc.weight" in names or "layers.0.hidden_norm.weight" in names or all(_MTP.fullmatch(name) for name in stored)


def open_head(model: str) -> Head:
    """Opens and checks a head: a folder (of a module: also that of its model), or a hub name. ValueError says what is wrong, naming the tensor or key."""
    folder = locate_folder(model)
    source = open_folder_tensors(folder)
    modules = {int(match[1]) for name in source.names() if (match := _MTP.fullmatch(name))}
    if modules - {0}:
        raise ValueError(f"{folder} holds {len(modules)} MTP modules, which is not supported; it must be one (mtp_layers.0), which is applied again for every further token")
    whole = "model.embed_tokens.weight" in source.names()
    tensors = _Unfused(RenamedSource(source, canonical_name if not modules else mtp_name if whole else lambda name: mtp_name(name) or name))
    shapes = {name: tensors.shape(name) for name in tensors.names()}
    try:
        config = head_config(read_json(folder / "config.json"), shapes)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if whole and not modules:
        raise ValueError(f"{folder} holds a language model, and no draft head or MTP module")
    _check_tensors(config, tensors, str(folder))
    head = Head(str(model), folder, config, tensors)
    _check_vocabulary(head)
    return head


def canonical_name(name: str) -> str | None:
    if BUFFERS.search(name):
        return None
    name = name.removeprefix("model.")
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    stem, _, kind = name.rpartition(".")
    return f"{_AUX_NORMS[stem]}.{kind}" if stem in _AUX_NORMS else name


def mtp_name(name: str) -> str | None:
    """None for what is not the module's."""
    match = _MTP.fullmatch(name)
    if match is None:
        return None
    stem, _, kind = match[2].rpartition(".")
    return f"{_MTP_NAMES[stem]}.{kind}" if stem in _MTP_NAMES else f"layers.0.{match[2]}"


class _Unfused:
    """A source whose qkv_proj and gate_up_proj are seen as the matrices they are stacked of (rows in that order; q as wide as o's input)."""

    def __init__(self, source: RenamedSource):
        self._source = source
        self._rows: dict[str, tuple[str, int, int]] = {}  # name -> fused name, first row, end
        for name in source.names():
            match = re.fullmatch(r"(layers\.\d+\.)(self_attn\.qkv_proj|mlp\.gate_up_proj)\.(weight|bias)", name)
            if match is None:
                continue
            layer, what, kind = match.groups()
            total = source.shape(name)[0]
            if what.endswith("gate_up_proj"):
                parts = {"mlp.gate_proj": total // 2, "mlp.up_proj": total - total // 2}
            else:
                o = f"{layer}self_attn.o_proj.weight"
                q = source.shape(o)[-1] if o in source.names() else total
                parts = {"self_attn.q_proj": q, "self_attn.k_proj": (total - q) // 2, "self_attn.v_proj": total - q - (total - q) // 2}
            at = 0
            for part, rows in parts.items():
                self._rows[f"{layer}{part}.{kind}"] = name, at, at + rows
                at += rows

    def names(self) -> list[str]:
        fused = {name for name, _, _ in self._rows.values()}
        return [name for name in self._source.names() if name not in fused] + list(self._rows)

    def stored(self, name: str) -> str:
        """The name in the file."""
        return self._source.stored(self._rows[name][0] if name in self._rows else name)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._rows:
            return self._source.shape(name)
        fused, first, end = self._rows[name]
        return (end - first, *self._source.shape(fused)[1:])

    def dtype(self, name: str) -> torch.dtype | None:
        return self._source.dtype(self._rows[name][0] if name in self._rows else name)

    def storage(self, name: str) -> str:
        return self._source.storage(self._rows[name][0] if name in self._rows else name)

    def get(self, name: str) -> Tensor:
        if name not in self._rows:
            return self._source.get(name)
        fused, first, end = self._rows[name]
        return self._source.get(fused)[first:end].contiguous()


def expected_tensors(config: HeadConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Name -> shape of the tensors that must be there, and of those that may."""
    c, h, wide = config.layers, config.layers.hidden_size, config.target_hidden_size
    must: dict[str, tuple[int, ...]] = {}
    may: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (c.vocab_size, h)}
    if config.fc_inputs:
        must["fc.weight"] = (h, config.fc_inputs)
        may["fc.bias"] = (h,)
    for i in range(c.num_layers):
        first = i == 0
        must |= layer_tensors(c, f"layers.{i}.", 2 * h if first and config.like_eagle3 else h)
        if not first or config.family != "eagle":
            must[f"layers.{i}.input_layernorm.weight"] = (h,)
    if config.family == "mtp":
        return must | {"token_layernorm.weight": (h,), "hidden_layernorm.weight": (wide,), "norm.weight": (h,)}, {}
    if config.family == "eagle":
        if config.input_norms:
            must |= {"embedding_layernorm.weight": (h,), "hidden_states_layernorm.weight": (wide,)}
        return must, may
    must |= {"layers.0.hidden_norm.weight": (h,), "norm.weight": (h,)}
    if config.use_aux and config.fc_norm:
        must |= {f"fc_norm.{j}.weight": (wide,) for j in range(config.num_aux)}
    if config.use_aux and config.norm_before_fc:
        must["input_norm.weight"] = (config.fc_inputs,)
    if config.family == "peagle":
        must["mask_hidden"] = (config.fc_inputs,)
    d = config.draft_vocab_size
    may |= {"lm_head.weight": (d, h), "d2t": (d,), "t2d": (c.vocab_size,)}
    if d != c.vocab_size:
        must |= {"d2t": (d,), "lm_head.weight": (d, h)}
    return must, may


def _check_tensors(config: HeadConfig, tensors: _Unfused, origin: str) -> None:
    must, may = expected_tensors(config)
    names = set(tensors.names())
    kind = _KINDS[config.family]
    missing, unexpected = sorted(must.keys() - names), sorted(names - must.keys() - may.keys())
    if missing:
        raise ValueError(f"{origin}: {len(missing)} tensors of this {kind} are missing: {some(missing)}" + (f" (and unexpected: {some(map(tensors.stored, unexpected))})" if unexpected else ""))
    if unexpected:
        raise ValueError(f"{origin}: {len(unexpected)} tensors do not belong to this {kind}: {some(map(tensors.stored, unexpected))}")
    for name, shape in (must | may).items():
        if name not in names:
            continue
        stored = tensors.shape(name)
        if (stored[-1:] if name == "mask_hidden" and max(stored[:-1], default=1) == 1 else stored) != shape:
            raise ValueError(f"{origin}: tensor '{tensors.stored(name)}' has shape {list(stored)}, but the config says {list(shape)} (vocab_size {config.layers.vocab_size}, "
                             f"draft_vocab_size {config.draft_vocab_size}, hidden_size {config.layers.hidden_size}, target_hidden_size {config.target_hidden_size})")
        accepted = {"d2t": (torch.int64, torch.int32), "t2d": (torch.bool,)}.get(name, DTYPES)
        if tensors.dtype(name) not in accepted:
            raise ValueError(f"{origin}: tensor '{tensors.stored(name)}' is {tensors.storage(name)}, which is not supported; it must be {' or '.join(str(t).removeprefix('torch.') for t in accepted)}")


def _check_vocabulary(head: Head) -> None:
    """d2t: offsets that make ascending ids of the target, the same that t2d marks."""
    ids, vocab = head.target_ids(), head.config.layers.vocab_size
    if ids is None:
        if "t2d" in head.tensors.names() and not head.tensors.get("t2d").all():
            raise ValueError(f"{head.path}: tensor 't2d' leaves tokens out, and there is no 'd2t'")
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        absolute = int(head.tensors.get("d2t").max()) < vocab
        raise ValueError(f"{head.path}: tensor 'd2t' gives token ids from {low} to {high}, and vocab_size is {vocab}; it must hold offsets (target id - draft id)"
                         + (", and looks as if it held the ids themselves" if low >= 0 and absolute else ""))
    if (ids.diff() <= 0).any():
        raise ValueError(f"{head.path}: tensor 'd2t' must give ascending token ids (target id = draft id + d2t[draft id]), and it does not")
    if "t2d" in head.tensors.names() and not torch.equal(head.tensors.get("t2d").nonzero().flatten(), ids):
        raise ValueError(f"{head.path}: tensors 'd2t' and 't2d' disagree: t2d marks {int(head.tensors.get('t2d').sum())} tokens, d2t gives {ids.numel()} (or others)")
