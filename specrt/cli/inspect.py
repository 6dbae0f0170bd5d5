"""Say what a checkpoint or draft head is, and whether it fits a target."""

from __future__ import annotations

import argparse
from typing import Any

_ROLLOUT = 200
_LEAST_AGREEMENT = 0.3
_QUESTION = "Tell me how bread is made, and why the dough has to rest."
#: Flag -> key of speculative_config.
_OVERRIDES = {"layer_ids": "eagle_aux_hidden_state_layer_ids", "norm_output": "norm_output", "mask_token_id": "mask_token_id"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder, file or hub name")
    parser.add_argument("--target", metavar="MODEL", help="the model that a draft model or head is meant for")
    parser.add_argument("--rollout", type=int, nargs="?", const=_ROLLOUT, metavar="N",
                        help=f"also run both on a greedy answer of N tokens (default {_ROLLOUT}) and count how often the first draft is right")
    group = parser.add_argument_group("overrides of what a head's config says (those of speculative_config)")
    group.add_argument("--layer-ids", type=int, nargs="+", metavar="N", help="the boundaries it captures (eagle_aux_hidden_state_layer_ids)")
    group.add_argument("--norm-output", action=argparse.BooleanOptionalAction, help="whether its next feature is taken behind the last norm")
    group.add_argument("--mask-token-id", type=int, metavar="ID", help="P-EAGLE's mask token")


def run(args: argparse.Namespace) -> int:
    from specrt.weights.inspect import describe

    if args.rollout is not None and (args.target is None or args.rollout < 1):
        raise ValueError("--rollout needs a --target to run, and at least 1 token")
    overrides = {name: getattr(args, name) for name in _OVERRIDES if getattr(args, name) is not None}
    print(describe(args.path, args.target, **overrides))
    if args.rollout is not None:
        share, tokens = agreement(args.path, args.target, args.rollout, {_OVERRIDES[name]: value for name, value in overrides.items()})
        print(f"first draft right in {share:.0%} of {tokens} rounds")
        if share < _LEAST_AGREEMENT:
            print(f"warning: below {_LEAST_AGREEMENT:.0%}, a head trained for this target does better; layer ids, norm flags or the target may be wrong")
    return 0


def agreement(path: str, target: str, tokens: int, overrides: dict[str, Any]) -> tuple[float, int]:
    """The share of rounds whose one draft was right, on a greedy answer; and how many rounds had one. overrides: keys of speculative_config."""
    from specrt import LLM, SamplingParams
    from specrt.weights.inspect import head_method

    spec = {"method": head_method(path) or "draft_model", "model": path, "num_speculative_tokens": 1, **overrides}
    with LLM(target, max_batch_size=1, speculative_config=spec) as llm:
        chat = llm.tokenizer is not None and llm.tokenizer.has_chat_template
        prompt = [[{"role": "user", "content": _QUESTION}]] if chat else _QUESTION if llm.tokenizer is not None else [0, 1]
        (out,) = llm.generate(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), chat=chat)
    if out.error is not None:
        raise ValueError(f"the rollout failed: {out.error}")
    return out.stats.draft_acceptance_rate, out.stats.num_draft_tokens
