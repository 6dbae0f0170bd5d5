"""Drafters. ``DRAFTERS`` maps a method's name to its factory: (SpeculativeConfig, target, its tokenizer and name, device, dtype) -> Drafter."""

from __future__ import annotations

import warnings
from typing import Any, Callable

from specrt import ops
from specrt.draft.base import Drafter
from specrt.heads import shipped_for, what_ships


def _ngram(config: Any, **_: Any) -> Drafter:
    from specrt.draft.ngram import NgramDrafter

    return NgramDrafter(config.prompt_lookup_min, config.prompt_lookup_max, config.eagle_topk if config.is_tree else 1)


def _draft_model(config: Any, *, target: Any, tokenizer: Any, dtype: Any, device: Any, **_: Any) -> Drafter:
    from specrt.draft.draft_model import DraftModelDrafter
    from specrt.models.dense import DenseModel
    from specrt.weights import open_checkpoint

    if tokenizer is None:
        raise ValueError("speculative_config['method'] = 'draft_model' needs the target's tokenizer to compare with the draft model's, and the target has none")
    checkpoint = open_checkpoint(config.model)
    if checkpoint.tokenizer().fingerprint() != tokenizer.fingerprint():
        raise ValueError(f"speculative_config['model']: the draft model {config.model!r} has another tokenizer than the target (the token -> id tables differ); "
                         "a draft model must share the target's vocabulary")
    return DraftModelDrafter(DenseModel.load(checkpoint, dtype, device, config.quantization, target.kv_dtype, target.positions), **growth(config))


def _head(family: str) -> Callable[..., Drafter]:
    def factory(config: Any, *, target: Any, tokenizer: Any, target_name: str = "", **_: Any) -> Drafter:
        from specrt.draft.head import HeadDrafter
        from specrt.draft.peagle import PEagleDrafter
        from specrt.models.head import load_head
        from specrt.weights.head import open_head
        from specrt.weights.head_fit import fit

        model = config.model or target_name  # a module may lie in its target's own files
        try:
            head = open_head(model)
        except ValueError as error:
            raise (error if config.model else ValueError(f"speculative_config['model'] is missing, and the target holds no MTP module: {error}{what_ships()}")) from None
        if head.config.family != family:
            raise ValueError(f"speculative_config['method'] = {family!r}, but {model!r} is a head of method {head.config.family!r}")
        head = head.overridden(config.eagle_aux_hidden_state_layer_ids, config.norm_output, config.mask_token_id)
        found = fit(head, target.config, target_name, tokenizer)
        if model != shipped_for(target_name, family):  # what a head of the package is worth to its target has been measured
            for warning in found:
                warnings.warn(f"head {model!r}: {warning}", stacklevel=2)
        boundaries, mask = head.config.boundaries(target.num_layers), head.config.mask_token_id
        if family != "peagle":
            return HeadDrafter(load_head(head, target, config.quantization), boundaries, **growth(config))
        if mask is None:
            raise ValueError(f"head {model!r}: its config.json has no mask_token_id; give speculative_config['mask_token_id'], the id it was trained with")
        return PEagleDrafter(load_head(head, target, config.quantization), boundaries, mask, **growth(config))

    return factory


def _medusa(config: Any, *, target: Any, tokenizer: Any, target_name: str = "", **_: Any) -> Drafter:
    from specrt.draft.medusa import MedusaDrafter
    from specrt.models.medusa import MedusaModel
    from specrt.weights.head_fit import fit_medusa
    from specrt.weights.medusa import open_medusa

    head = open_medusa(config.model)
    for warning in fit_medusa(head, target.config, target_name, tokenizer):
        warnings.warn(f"head {config.model!r}: {warning}", stacklevel=2)
    if config.max_depth > head.num_heads:
        key = "num_steps" if config.is_tree else "num_speculative_tokens"
        raise ValueError(f"speculative_config[{key!r}] gives drafts a depth of {config.max_depth}; {config.model!r} has {head.num_heads} heads, so it must be at most that")
    return MedusaDrafter(MedusaModel(head, target, config.quantization), target.num_layers, **growth(config))


def _layerskip(config: Any, *, target: Any, **_: Any) -> Drafter:
    from specrt.draft.layerskip import LayerSkipDrafter

    layers = target.num_layers
    exit_layer = target.config.exit_layer if config.exit_layer is None else config.exit_layer
    if exit_layer is None:
        raise ValueError(f"speculative_config['exit_layer'] is missing, and the target's generation_config.json has no assistant_early_exit; give how many of its {layers} layers draft")
    if exit_layer >= layers:
        source = "the target's assistant_early_exit" if config.exit_layer is None else "speculative_config['exit_layer']"
        raise ValueError(f"{source} = {exit_layer} is not valid: it must be at least 1 and below the target's number of layers, {layers}")
    return LayerSkipDrafter(target, exit_layer, **growth(config))


def growth(config: Any) -> dict[str, Any]:
    """How a drafter with a network grows its trees (Expansion)."""
    rejection = config.rejection_sample_method == "standard"
    sampled = config.draft_sample_method != "greedy"
    topk = config.eagle_topk if config.is_tree else 1
    levels = config.num_steps if config.is_tree else config.num_speculative_tokens
    noise = -1 if not sampled else ops.NOISE_DRAFT if rejection else ops.NOISE_SHARED
    return dict(levels=levels, beam_width=1 if rejection else config.beam_width, topk=topk, noise=noise, keep_logits=rejection and sampled, choices=config.choices)


DRAFTERS: dict[str, Callable[..., Drafter]] = {"ngram": _ngram, "draft_model": _draft_model, "eagle": _head("eagle"), "eagle3": _head("eagle3"), "peagle": _head("peagle"),
                                            "mtp": _head("mtp"), "medusa": _medusa, "layerskip": _layerskip}


def build(config: Any, *, target: Any, tokenizer: Any, device: Any, dtype: Any, target_name: str = "") -> Drafter:
    """The drafter of a SpeculativeConfig. target_name: what the user called the target. ValueError if its model does not fit the target; warnings where it looks wrong."""
    return DRAFTERS[config.method](config, target=target, tokenizer=tokenizer, device=device, dtype=dtype, target_name=target_name)
