"""What ``specrt inspect`` says about a checkpoint."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from specrt.heads import shipped, shipped_for
from specrt.models.config import ModelConfig
from specrt.text.tokenizer import Tokenizer
from specrt.weights.checkpoint import Checkpoint, locate_folder, open_checkpoint
from specrt.weights.fp8 import Fp8Source
from specrt.weights.head import is_head, open_head
from specrt.weights.inspect_head import head_lines, medusa_lines
from specrt.weights.medusa import is_medusa

_SCALE_OVER = {"tensor": "tensor", "channel": "output channel", "block": "block of 128 x 128"}


def describe(path: str | Path, target: str | Path | None = None, **overrides: Any) -> str:
    """A description of a checkpoint or draft head in lines of "key  value"; with ``target`` also whether it can draft for that model. overrides: of ``Head.overridden``.

    ValueError if either cannot be opened, or if the draft does not fit its target (another tokenizer, a head of another shape)."""
    method = head_method(path)
    if overrides and method in (None, "medusa"):
        raise ValueError(f"{', '.join(overrides)}: '{path}' is {'no draft head' if method is None else 'MEDUSA heads'}, which has no such setting; leave it out")
    if method is not None:
        opened = None if target is None else open_checkpoint(target)
        lines = medusa_lines(path, opened) if method == "medusa" else head_lines(path, opened, overrides)
    else:
        checkpoint = open_checkpoint(path)
        lines = _model(checkpoint) + _weights(checkpoint) + _text(checkpoint)
        if target is not None:
            lines.append(("fits as draft of", _fit(checkpoint, open_checkpoint(target))))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


def head_method(path: str | Path) -> str | None:
    """The ``method`` of a draft head; None for what is no head."""
    try:
        folder = locate_folder(path)
    except ValueError:
        return None  # a file, or the embedded model
    if is_medusa(folder):
        return "medusa"
    return open_head(str(path)).config.family if is_head(folder) else None


def check_draft(draft: Checkpoint, target: Checkpoint) -> None:
    """ValueError unless the two models have the same tokenizer (the same token -> id table; a padded vocabulary is no difference)."""
    ours, theirs = draft.tokenizer(), target.tokenizer()
    if ours.fingerprint() != theirs.fingerprint():
        raise ValueError(f"draft model '{draft.origin}' has another tokenizer than target '{target.origin}' (the token -> id tables differ: "
                         f"{len(ours)} and {len(theirs)} tokens{_first_difference(ours, theirs)})")


def _model(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    c = checkpoint.config
    return [
        ("model", checkpoint.origin), ("path", str(checkpoint.path)), ("format", checkpoint.form), ("architecture", c.architecture),
        ("parameters", f"{c.num_parameters / 1e6:,.1f} M"),
        ("layers", f"{c.num_layers} of hidden size {c.hidden_size}, intermediate size {c.intermediate_size}"),
        ("attention", f"{c.num_heads} heads, {c.num_kv_heads} KV heads, head dim {c.head_dim}" + _attention_extras(c)),
        ("context", f"{c.max_position_embeddings} positions, {_rope(c)}"),
        ("vocabulary", f"{c.vocab_size} rows, {'head tied to the embedding' if c.tie_word_embeddings else 'own head'}"),
        ("stop tokens", ", ".join(map(str, c.eos_token_ids)) or "none"), *_layerskip(checkpoint), *_heads(checkpoint)]


def _layerskip(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Of a target trained to draft with its own first layers. Nothing but its name says so where no exit layer is stored."""
    layer = checkpoint.config.exit_layer
    if layer is None and "layerskip" not in Path(checkpoint.origin).name.lower():
        return []
    where = f"say exit_layer, 1 to {checkpoint.config.num_layers - 1}" if layer is None else f"exit_layer {layer} (assistant_early_exit)"
    return [("self-speculation", f"LayerSkip target, method 'layerskip'; {where}")]


def _heads(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Of the model that heads come for."""
    names = [name for name in shipped() if name == shipped_for(checkpoint.origin, name.rpartition("-")[2])]
    return [("draft heads", f"{', '.join(names)}, which come with the package")] if names else []


def _attention_extras(c: ModelConfig) -> str:
    windowed = [w for w in c.windows if w]
    return "".join([", q/k/v bias" * c.attention_bias, ", q/k norm" * c.qk_norm,
                    f", sliding window {windowed[0]} on {len(windowed)} layers" if windowed else ""])


def _rope(c: ModelConfig) -> str:
    return f"RoPE theta {c.rope_theta:g}" + (f", scaling {c.rope_scaling['rope_type']}" if c.rope_scaling else "")


def _weights(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    source = checkpoint.tensors
    count: Counter[str] = Counter()
    for name in source.names():
        count[source.storage(name)] += prod(source.shape(name))
    total = sum(count.values())
    quantized = source.strategy if isinstance(source, Fp8Source) else None
    scales = checkpoint.kv_scales.layers if checkpoint.kv_scales is not None else 0
    return [("weights", f"{len(source.names())} tensors: " + ", ".join(f"{kind} {n / total:.1%}" for kind, n in count.most_common()) + " of the numbers"),
            *([("quantization", f"fp8 (e4m3), a scale for each {_SCALE_OVER[quantized]}; {sum(map(source.is_fp8, source.names()))} matrices")] if quantized else []),
            *([("KV scales", f"of {scales} of {checkpoint.config.num_layers} layers, for kv_cache_dtype fp8")] if scales else []),
            ("check", "every tensor is there, of the shape the config says")]


def _text(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    try:
        tokenizer = checkpoint.tokenizer()
    except ValueError as error:
        return [("tokenizer", f"none: {error}")]
    return [("tokenizer", f"{len(tokenizer)} tokens, fingerprint {tokenizer.fingerprint()[:16]}"), ("chat template", "yes" if tokenizer.has_chat_template else "no")]


def _fit(draft: Checkpoint, target: Checkpoint) -> str:
    check_draft(draft, target)
    share = draft.config.num_parameters / target.config.num_parameters
    return f"{target.origin}: yes, same tokenizer; {share:.1%} of the target's parameters"


def _first_difference(a: Tokenizer, b: Tokenizer) -> str:
    for i in range(min(len(a), len(b))):
        if a.id_to_token(i) != b.id_to_token(i):
            return f"; id {i} is {a.id_to_token(i)!r} and {b.id_to_token(i)!r}"
    return ""
