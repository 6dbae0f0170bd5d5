"""What ``specrt inspect`` says about a draft head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specrt.text.tokenizer import Tokenizer
from specrt.weights.checkpoint import Checkpoint
from specrt.weights.head import Head, open_head
from specrt.weights.head_config import HeadConfig
from specrt.weights.head_fit import fit, fit_medusa
from specrt.weights.medusa import open_medusa

_KINDS = {"eagle": "EAGLE-1/2 head", "eagle3": "EAGLE-3 head", "peagle": "P-EAGLE head", "mtp": "MTP module"}
_FLAGS = ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output", "input_norms", "embedding_first")


def head_lines(path: str | Path, target: Checkpoint | None, overrides: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, value) pairs; with ``target`` also whether the head fits it, and what looks wrong. overrides: of ``Head.overridden``. ValueError if the head is broken or does not fit."""
    head = open_head(str(path)).overridden(**overrides)
    c, layers = head.config, head.config.layers
    kind = _KINDS[c.family] + (" (3.1)" if c.family == "eagle3" and (c.fc_norm or c.norm_output) else "")
    windowed = f", sliding window {max(layers.windows)}" if any(layers.windows) else ""
    lines = [
        ("head", head.origin), ("path", str(head.path)), ("format", c.form), ("kind", kind + f", method {c.family!r}"),
        ("layers", f"{layers.num_layers} of hidden size {layers.hidden_size}, intermediate size {layers.intermediate_size}"),
        ("attention", f"{layers.num_heads} heads, {layers.num_kv_heads} KV heads, head dim {layers.head_dim}{', q/k norm' * layers.qk_norm}{windowed}"),
        ("features", _features(c)), ("target", f"hidden size {c.target_hidden_size}, {layers.vocab_size} tokens" + (f"; made for {c.verifier}" if c.verifier else "")),
        ("draft vocabulary", f"{c.draft_vocab_size} tokens" + (" of the target's" if head.target_ids() is not None else ", the target's")),
        ("flags", ", ".join(name for name in _FLAGS if getattr(c, name)) or "none"), ("own", _owned(head)), ("check", "every tensor is there, of the shape the config says")]
    if c.family == "peagle":
        lines.insert(-1, ("mask token", "not in the config: say speculative_config['mask_token_id']" if c.mask_token_id is None else str(c.mask_token_id)))
    if c.suggested_tokens is not None:
        lines.insert(-1, ("suggests", f"num_speculative_tokens {c.suggested_tokens}"))
    return lines if target is None else lines + _fit_lines(head, target)


def _features(c: HeadConfig) -> str:
    if c.final_feature:
        return "the target's last state after its norm"
    ids = "[2, L/2, L-3] of a target with L layers" if c.layer_ids is None else str(list(c.layer_ids))
    return f"boundaries {ids} ({c.ids_read})"


def _owned(head: Head) -> str:
    own = [name for name, there in (("embedding", head.own_embedding), ("lm_head", head.config.own_lm_head)) if there]
    return f"{' and '.join(own) or 'neither embedding nor lm_head'}; the rest is the target's" if len(own) < 2 else "embedding and lm_head"


def _fit_lines(head: Head, target: Checkpoint) -> list[tuple[str, str]]:
    warnings = fit(head, target.config, target.origin, _tokenizer(target))
    boundaries = list(head.config.boundaries(target.config.num_layers))
    return [("fits as draft of", f"{target.origin}: yes"), ("captures", f"boundaries {boundaries} of {target.config.num_layers} layers"), *(("warning", w) for w in warnings)]


def medusa_lines(path: str | Path, target: Checkpoint | None) -> list[tuple[str, str]]:
    """``head_lines`` of MEDUSA heads."""
    head = open_medusa(str(path))
    lines = [
        ("head", head.origin), ("path", str(head.path)), ("kind", "MEDUSA heads, method 'medusa'"),
        ("layers", f"{head.num_heads} heads of {head.num_layers} residual blocks{' with bias' * head.bias}, {'one lm_head for all' if head.shared_lm_head else 'an lm_head each'}"),
        ("target", f"hidden size {head.hidden_size}" + (f"; made for {head.base}" if head.base else "")),
        ("draft vocabulary", f"{head.draft_vocab_size} tokens" + (" of the target's" if head.target_ids() is not None else ", the target's")),
        ("check", "every tensor is there, of one shape")]
    if target is not None:
        warnings = fit_medusa(head, target.config, target.origin, _tokenizer(target))
        lines += [("fits as draft of", f"{target.origin}: yes"), *(("warning", w) for w in warnings)]
    return lines


def _tokenizer(target: Checkpoint) -> Tokenizer | None:
    try:
        return target.tokenizer()
    except ValueError:
        return None
