"""Speculation: what one request speculates with, from the engine's configuration and the request's own wish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specrt.checks import refuse
from specrt.config import EngineConfig, SpeculativeConfig

_TREE_KEYS = ("num_steps", "eagle_topk", "num_draft_tokens")


@dataclass(frozen=True)
class Speculation:
    """method: a drafter of the engine, None = off. num_speculative_tokens: most draft nodes a round; max_depth: most of them on one path."""

    method: str | None = None
    num_speculative_tokens: int = 0
    max_depth: int = 0


def resolve(wish: bool | dict[str, Any] | None, config: EngineConfig) -> Speculation:
    """``SamplingParams.speculative`` (already checked by itself) within the engine's limits. ValueError where it does not fit."""
    if wish is False or (wish is None and config.speculative is None):
        return Speculation()
    wish = wish or {}
    method = wish.get("method", config.speculative.method if config.speculative else None)
    if method is None:
        raise ValueError(f"speculative = {wish!r} names no method and the engine has no speculative_config; add 'method': 'ngram', or configure the engine")
    if method not in config.drafters:
        raise refuse("speculative['method']", method, "one of " + ", ".join(map(repr, config.drafters)) + " (others are named in the engine's speculative_config)")
    drafter = config.drafters[method]
    return _tree(wish, drafter) if drafter.is_tree else _chain(wish, drafter, config)


def _chain(wish: dict[str, Any], drafter: SpeculativeConfig, config: EngineConfig) -> Speculation:
    for key in _TREE_KEYS:
        if key in wish:
            raise ValueError(f"speculative[{key!r}]: the engine's {drafter.method!r} drafter makes chains; use num_speculative_tokens, or configure the engine with {key!r}")
    # Lookup has no buffers of its own: it may fill whatever the engine verifies.
    most = config.width - 1 if drafter.method == "ngram" else drafter.num_speculative_tokens
    length = wish.get("num_speculative_tokens", drafter.num_speculative_tokens)
    if length > most:
        raise refuse("speculative['num_speculative_tokens']", length, f"at most {most} for this engine's {drafter.method!r} drafter")
    return Speculation(drafter.method, length, length)


def _tree(wish: dict[str, Any], drafter: SpeculativeConfig) -> Speculation:
    """A tree may be made smaller, not wider: its branching is built into the drafter's buffers. num_speculative_tokens is the number of draft nodes here."""
    if wish.get("eagle_topk", drafter.eagle_topk) != drafter.eagle_topk:
        raise refuse("speculative['eagle_topk']", wish["eagle_topk"], f"the engine's own, {drafter.eagle_topk}")
    steps = wish.get("num_steps", drafter.num_steps)
    if steps > drafter.num_steps:
        raise refuse("speculative['num_steps']", steps, f"at most {drafter.num_steps} for this engine's {drafter.method!r} drafter")
    nodes = drafter.max_draft_tokens
    if drafter.unranked_tree_only:
        nodes = steps * drafter.eagle_topk
    key, root = ("num_speculative_tokens", 0) if "num_speculative_tokens" in wish else ("num_draft_tokens", 1)  # the latter counts the root
    wanted = wish.get(key, nodes + root) - root
    if wanted > nodes:
        raise refuse(f"speculative[{key!r}]", wish[key], f"at most {nodes + root} for this engine's {drafter.method!r} drafter")
    if drafter.unranked_tree_only and wanted != nodes:
        raise ValueError(f"speculative[{key!r}] = {wish[key]} re-ranks the tree after its nodes were drawn, which is biased under rejection_sample_method "
                         "'standard'; give num_steps alone, or configure rejection_sample_method 'exact'")
    return Speculation(drafter.method, wanted, min(steps, wanted))
