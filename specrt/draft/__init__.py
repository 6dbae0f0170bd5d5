"""Drafters. ``DRAFTERS`` maps a method's name to its factory: (SpeculativeConfig, target, target tokenizer, device, dtype) -> Drafter."""

from __future__ import annotations

from typing import Any, Callable

from specrt import ops
from specrt.draft.base import Drafter


def _ngram(config: Any, **_: Any) -> Drafter:
    from specrt.draft.ngram import NgramDrafter

    return NgramDrafter(config.prompt_lookup_min, config.prompt_lookup_max, config.eagle_topk if config.is_tree else 1)


def _draft_model(config: Any, *, tokenizer: Any, dtype: Any, device: Any, **_: Any) -> Drafter:
    from specrt.draft.draft_model import DraftModelDrafter
    from specrt.models.dense import DenseModel
    from specrt.weights import open_checkpoint

    if tokenizer is None:
        raise ValueError("speculative_config['method'] = 'draft_model' needs the target's tokenizer to compare with the draft model's, and the target has none")
    checkpoint = open_checkpoint(config.model)
    if checkpoint.tokenizer().fingerprint() != tokenizer.fingerprint():
        raise ValueError(f"speculative_config['model']: the draft model {config.model!r} has another tokenizer than the target (the token -> id tables differ); "
                         "a draft model must share the target's vocabulary")
    model = DenseModel.load(checkpoint, dtype, device, config.quantization)
    rejection = config.rejection_sample_method == "standard"
    sampled = config.draft_sample_method != "greedy"
    topk = config.eagle_topk if config.is_tree else 1
    levels = config.num_steps if config.is_tree else config.num_speculative_tokens
    noise = -1 if not sampled else ops.NOISE_DRAFT if rejection else ops.NOISE_SHARED
    return DraftModelDrafter(model, levels, 1 if rejection else topk, topk, noise, keep_logits=rejection and sampled)


DRAFTERS: dict[str, Callable[..., Drafter]] = {"ngram": _ngram, "draft_model": _draft_model}


def build(config: Any, *, target: Any, tokenizer: Any, device: Any, dtype: Any) -> Drafter:
    """The drafter of a SpeculativeConfig. ValueError if its model does not fit the target."""
    return DRAFTERS[config.method](config, target=target, tokenizer=tokenizer, device=device, dtype=dtype)
