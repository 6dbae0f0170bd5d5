"""EngineConfig and SpeculativeConfig: what an engine is told at the start, every key checked.

Keys follow vLLM's speculative_config (chains) and SGLang's (trees: num_steps, eagle_topk, num_draft_tokens)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from specrt.checks import boolean, choice, integer, known_keys, number, refuse
from specrt.heads import shipped_for, what_ships

MAX_NODES = 64  # rows of a request in a round: one 64-bit ancestor word a node
DEFAULT_MAX_MODEL_LEN = 8192
_CHAIN_LENGTH = {"ngram": 8, "mtp": 3}  # specrt train makes MTP modules for three
_DEFAULT_CHAIN_LENGTH = 4
_LOOKUP = (2, 4)  # prompt_lookup_min, prompt_lookup_max
_DEFAULT_STEPS, _DEFAULT_TOPK = 5, 4
_NEED_MODEL = {"draft_model": "a path, a hub name or 'smollm2-135m'", "eagle": "the folder of an EAGLE head or a hub name", "eagle3": "the folder of an EAGLE-3 head or a hub name",
               "peagle": "the folder of a P-EAGLE head or a hub name", "medusa": "the folder of MEDUSA heads or a hub name"}
_NO_WEIGHTS = {"ngram": "which needs no model", "layerskip": "which drafts with the target's own layers"}
_TREE_KEYS = ("num_steps", "eagle_topk", "num_draft_tokens")


@dataclass(frozen=True)
class SpeculativeConfig:
    """One drafter and how its drafts are verified. Made by ``parse``, which fills in and checks everything. model: None where the method needs none, or it lies in the target's own files.

    A chain has num_speculative_tokens and no tree keys; a tree has num_steps (depth), eagle_topk (branches) and num_draft_tokens (rows verified, root included). A static tree is
    given by choices, the ranks of each node's path from the root (MEDUSA's lists): (0, 2) is the third best child of the best; the three tree keys follow from it.
    eagle_aux_hidden_state_layer_ids (residual-stream boundaries) and norm_output override what an EAGLE-3 (P-EAGLE) head's config says,
    mask_token_id what a P-EAGLE head's does. exit_layer: how many of the target's layers draft (LayerSkip); None: what its files say."""

    method: str
    model: str | None = None
    num_speculative_tokens: int | None = None
    num_steps: int | None = None
    eagle_topk: int | None = None
    num_draft_tokens: int | None = None
    prompt_lookup_min: int | None = None
    prompt_lookup_max: int | None = None
    rejection_sample_method: str = "exact"
    synthetic_acceptance_length: float | None = None
    draft_sample_method: str = "shared_noise"
    quantization: str | None = None
    draft_tensor_parallel_size: int = 1
    eagle_aux_hidden_state_layer_ids: tuple[int, ...] | None = None
    norm_output: bool | None = None
    mask_token_id: int | None = None
    exit_layer: int | None = None
    choices: tuple[tuple[int, ...], ...] | None = None

    @property
    def beam_width(self) -> int:
        """Nodes of a level that are expanded (of a tree that is re-ranked)."""
        return _static_width(self.choices) if self.choices is not None else self.eagle_topk if self.is_tree else 1

    @property
    def is_tree(self) -> bool:
        return self.num_draft_tokens is not None

    @property
    def max_draft_tokens(self) -> int:
        """Most draft nodes a round."""
        return self.num_draft_tokens - 1 if self.is_tree else self.num_speculative_tokens

    @property
    def max_depth(self) -> int:
        return min(self.num_steps, self.max_draft_tokens) if self.is_tree else self.num_speculative_tokens

    @property
    def unranked_tree_only(self) -> bool:
        """Rejection sampling from a stored q: a tree must hold every child that was drawn (a lookup's drafts are a point mass, any tree will do)."""
        return self.rejection_sample_method == "standard" and self.method != "ngram"

    @classmethod
    def parse(cls, given: Any, target: str = "") -> SpeculativeConfig:
        """From the dict the user gave; target: what the user calls the model, for which a head may come with the package. ValueError names the key, the value and what would be accepted."""
        if not isinstance(given, dict):
            raise refuse("speculative_config", given, "None or a dict with at least 'method'")
        known_keys("speculative_config", given, [f.name for f in fields(cls)])
        given = {key: value for key, value in given.items() if value is not None}
        values = _drafter(given, target) | _verification(given)
        shape = _static_tree if "choices" in given else _tree if any(key in given for key in _TREE_KEYS) else _chain
        values |= shape(values["method"], given)
        config = cls(**values)
        _check_verifiable(config)
        return config


def _methods() -> list[str]:
    from specrt.draft import DRAFTERS  # late: the registry needs the compiled extension, and tests add to it

    return list(DRAFTERS)


def _key(name: str) -> str:
    return f"speculative_config[{name!r}]"


def _drafter(given: dict[str, Any], target: str) -> dict[str, Any]:
    if "method" not in given:
        raise ValueError(f"speculative_config has no 'method'; it must be one of {', '.join(map(repr, _methods()))}")
    method = choice(_key("method"), given["method"], _methods())
    values: dict[str, Any] = {"method": method}
    if "model" in given:
        if method in _NO_WEIGHTS:
            raise ValueError(f"{_key('model')} = {given['model']!r:.100} has no meaning for method {method!r}, {_NO_WEIGHTS[method]}; leave it out")
        if not isinstance(given["model"], (str, Path)) or not str(given["model"]):
            raise refuse(_key("model"), given["model"], "a path, a hub name or 'smollm2-135m'")
        values["model"] = str(given["model"])
    elif (head := shipped_for(target, method)) is not None:
        values["model"] = head
    elif method in _NEED_MODEL:
        raise ValueError(f"{_key('model')} is missing; method {method!r} needs {_NEED_MODEL[method]}{what_ships()}")
    values |= _head(method, given)
    values |= _lookup(method, given)
    if "quantization" in given:
        if method in _NO_WEIGHTS:
            raise ValueError(f"{_key('quantization')} = {given['quantization']!r} has no meaning for method {method!r}, {_NO_WEIGHTS[method]}; leave it out")
        values["quantization"] = choice(_key("quantization"), given["quantization"], ["fp8", None])
    if "draft_tensor_parallel_size" in given:
        integer(_key("draft_tensor_parallel_size"), given["draft_tensor_parallel_size"], 1, 1)
    if "draft_sample_method" in given:
        values["draft_sample_method"] = choice(_key("draft_sample_method"), given["draft_sample_method"], ["shared_noise", "greedy"])
        if method == "ngram" and values["draft_sample_method"] != "shared_noise":
            raise ValueError(f"{_key('draft_sample_method')} = {given['draft_sample_method']!r} has no meaning for method 'ngram'; leave it out")
    return values


def _head(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Overrides of what a head's config says, or the target's."""
    values: dict[str, Any] = {}
    for name, methods in (("eagle_aux_hidden_state_layer_ids", ("eagle3", "peagle")), ("norm_output", ("eagle3", "peagle")), ("mask_token_id", ("peagle",)),
                          ("exit_layer", ("layerskip",))):
        if name in given and method not in methods:
            raise ValueError(f"{_key(name)} belongs to method {' or '.join(map(repr, methods))}, not to {method!r}; leave it out")
    if "exit_layer" in given:
        values["exit_layer"] = integer(_key("exit_layer"), given["exit_layer"], 1, 4096)
    if "mask_token_id" in given:
        values["mask_token_id"] = integer(_key("mask_token_id"), given["mask_token_id"], 0)
    if "norm_output" in given:
        values["norm_output"] = boolean(_key("norm_output"), given["norm_output"])
    ids = given.get("eagle_aux_hidden_state_layer_ids")
    if ids is not None:
        if not isinstance(ids, (list, tuple)) or not ids:
            raise refuse(_key("eagle_aux_hidden_state_layer_ids"), ids, "a list of layer boundaries, for example [2, 15, 27]")
        values["eagle_aux_hidden_state_layer_ids"] = tuple(integer(_key("eagle_aux_hidden_state_layer_ids"), i, 0, 4096) for i in ids)
    return values


def _lookup(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """prompt_lookup_min, prompt_lookup_max: where one is given, both equal (vLLM); with neither, 2 and 4, which drafts more often than vLLM's 5 and 5
    and measured better on summaries and answers from a text."""
    bounds = {key: integer(_key(key), given[key], 1, 1024) for key in ("prompt_lookup_min", "prompt_lookup_max") if key in given}
    if method != "ngram":
        if bounds:
            raise ValueError(f"{_key(next(iter(bounds)))} belongs to method 'ngram', not to {method!r}; leave it out")
        return {}
    low = bounds.get("prompt_lookup_min", bounds.get("prompt_lookup_max", _LOOKUP[0]))
    high = bounds.get("prompt_lookup_max", low if bounds else _LOOKUP[1])
    if low > high:
        raise ValueError(f"{_key('prompt_lookup_min')} = {low} is above prompt_lookup_max = {high}; it must be at most that")
    return {"prompt_lookup_min": low, "prompt_lookup_max": high}


def _chain(method: str, given: dict[str, Any]) -> dict[str, Any]:
    length = given.get("num_speculative_tokens", _CHAIN_LENGTH.get(method, _DEFAULT_CHAIN_LENGTH))
    return {"num_speculative_tokens": integer(_key("num_speculative_tokens"), length, 1, MAX_NODES - 1)}


def _tree(method: str, given: dict[str, Any]) -> dict[str, Any]:
    if "num_speculative_tokens" in given:
        raise ValueError(f"{_key('num_speculative_tokens')} (a chain's length) and the tree keys {', '.join(_TREE_KEYS)} exclude each other; give one or the other")
    steps = integer(_key("num_steps"), given.get("num_steps", _DEFAULT_STEPS), 1, MAX_NODES - 1)
    topk = integer(_key("eagle_topk"), given.get("eagle_topk", _DEFAULT_TOPK), 1, MAX_NODES - 1)
    nodes = integer(_key("num_draft_tokens"), given.get("num_draft_tokens", min(1 + steps * topk, MAX_NODES)), 2, MAX_NODES)
    most = _most_nodes(method, steps, topk)
    if nodes > most:
        raise ValueError(f"{_key('num_draft_tokens')} = {nodes} is more than num_steps = {steps} with eagle_topk = {topk} can fill; it must be at most {most}")
    return {"num_steps": steps, "eagle_topk": topk, "num_draft_tokens": nodes}


def _static_tree(method: str, given: dict[str, Any]) -> dict[str, Any]:
    key, paths = _key("choices"), given["choices"]
    other = next((name for name in ("num_speculative_tokens", *_TREE_KEYS) if name in given), None)
    if other is not None:
        raise ValueError(f"{_key(other)} and choices (a static tree, which says it all) exclude each other; give one or the other")
    if method == "ngram":
        raise ValueError(f"{key} has no meaning for method 'ngram', whose trees are what it finds; leave it out")
    if not isinstance(paths, (list, tuple)) or not 1 <= len(paths) < MAX_NODES or not all(isinstance(path, (list, tuple)) and path for path in paths):
        raise refuse(key, paths, f"a list of 1 to {MAX_NODES - 1} paths, each a list of ranks, for example [[0], [0, 0], [1]]")
    tree = tuple(sorted(tuple(integer(key, rank, 0, MAX_NODES - 2) for rank in path) for path in paths))
    missing = next((path for path in tree if len(path) > 1 and path[:-1] not in tree), None)
    if missing is not None or len(set(tree)) < len(tree):
        raise refuse(key, paths, "a tree: no path twice, and with every path the one it goes on from" + (f" ({list(missing[:-1])} for {list(missing)})" if missing else ""))
    topk = max(max(map(max, tree)) + 1, _static_width(tree))
    return {"choices": tree, "num_steps": max(map(len, tree)), "eagle_topk": topk, "num_draft_tokens": 1 + len(tree)}


def _static_width(tree: tuple[tuple[int, ...], ...]) -> int:
    """Most nodes of a level that have children."""
    parents = {path[:-1] for path in tree if len(path) > 1}
    return max((sum(len(parent) == level for parent in parents) for level in range(1, max(map(len, tree)))), default=1)


def _most_nodes(method: str, steps: int, topk: int) -> int:
    if method == "ngram":  # a trie: up to topk children a node
        return 1 + sum(topk ** min(depth, 6) for depth in range(1, steps + 1))
    return 1 + topk + (steps - 1) * topk * topk  # a beam of topk rows a level, topk children a row


def _verification(given: dict[str, Any]) -> dict[str, Any]:
    key = _key("rejection_sample_method")
    rule = given.get("rejection_sample_method", "exact")
    if rule == "typical":
        raise ValueError(f"{key} = 'typical' is not available in this version; accepted: 'exact', 'standard', 'synthetic'")
    values: dict[str, Any] = {"rejection_sample_method": choice(key, rule, ["exact", "standard", "synthetic"])}
    length = given.get("synthetic_acceptance_length")
    if rule == "synthetic":
        values["synthetic_acceptance_length"] = number(_key("synthetic_acceptance_length"), length, 1.0, MAX_NODES,
                                                       f"a number from 1 to the draft's depth + 1 (rejection_sample_method 'synthetic' needs it)")
    elif length is not None:
        raise ValueError(f"{_key('synthetic_acceptance_length')} = {length!r} goes with rejection_sample_method 'synthetic' only, not with {rule!r}")
    return values


def _check_verifiable(config: SpeculativeConfig) -> None:
    longest = config.max_depth + 1
    if config.synthetic_acceptance_length is not None and config.synthetic_acceptance_length > longest:
        raise refuse(_key("synthetic_acceptance_length"), config.synthetic_acceptance_length, f"at most the draft's depth + 1 = {longest}")
    if not (config.unranked_tree_only and config.is_tree):
        return
    if config.choices is not None:
        raise ValueError(f"{_key('choices')}: a static tree branches below other children than the first drawn, which rejection_sample_method 'standard' does not take; use 'exact'")
    whole = 1 + config.num_steps * config.eagle_topk
    if config.num_draft_tokens != whole:
        raise ValueError(f"{_key('num_draft_tokens')} = {config.num_draft_tokens} re-ranks the tree after its nodes were drawn, which is biased under "
                         f"rejection_sample_method 'standard'; it must be 1 + num_steps * eagle_topk = {whole} (at most {MAX_NODES}), or use rejection_sample_method 'exact'")


#: The n-gram drafter that every engine has, so that a request may ask for it.
DEFAULT_NGRAM = SpeculativeConfig("ngram", num_speculative_tokens=_CHAIN_LENGTH["ngram"], prompt_lookup_min=_LOOKUP[0], prompt_lookup_max=_LOOKUP[1])


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine is built from. ``parse`` checks the user's keys; ``for_model`` and ``with_pages`` fill in what depends on the model and the machine.

    prefill_chunk: most prompt rows a step. num_pages: pages of the KV pool (0: not sized yet). enforce_eager: never capture CUDA graphs:
    the same rounds, the same bits, more of the host's time."""

    device: str = "cpu"
    dtype: str = "bfloat16"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_batch_size: int = 8
    max_model_len: int | None = None
    kv_cache_memory: int | None = None
    page_size: int = 64
    enforce_eager: bool = False
    speculative: SpeculativeConfig | None = None
    prefill_chunk: int = 512
    num_pages: int = 0

    @classmethod
    def parse(cls, *, device: str | None = None, dtype: str = "bfloat16", quantization: str | None = None, kv_cache_dtype: str = "auto", max_batch_size: int = 8,
              max_model_len: int | None = None, kv_cache_memory: int | None = None, page_size: int = 64, enforce_eager: bool = False,
              speculative_config: dict[str, Any] | None = None, target: str = "") -> EngineConfig:
        """target: as SpeculativeConfig.parse's."""
        return cls(
            device=_device(device),
            dtype=choice("dtype", dtype, ["bfloat16", "float32"]),
            quantization=choice("quantization", quantization, ["fp8", None]),
            kv_cache_dtype=choice("kv_cache_dtype", kv_cache_dtype, ["auto", "fp8"]),
            max_batch_size=integer("max_batch_size", max_batch_size, 1, 1024),
            max_model_len=None if max_model_len is None else integer("max_model_len", max_model_len, 2, 2**24),
            kv_cache_memory=None if kv_cache_memory is None else integer("kv_cache_memory (bytes)", kv_cache_memory, 1),
            page_size=choice("page_size", page_size, [16, 32, 64]),
            enforce_eager=boolean("enforce_eager", enforce_eager),
            speculative=None if speculative_config is None else SpeculativeConfig.parse(speculative_config, target),
        )

    def for_model(self, max_position_embeddings: int) -> EngineConfig:
        """With max_model_len settled: min(max_position_embeddings, 8192) where the user gave none."""
        if self.max_model_len is None:
            return replace(self, max_model_len=min(max_position_embeddings, DEFAULT_MAX_MODEL_LEN))
        if self.max_model_len > max_position_embeddings:
            raise refuse("max_model_len", self.max_model_len, f"at most the model's max_position_embeddings = {max_position_embeddings}")
        return self

    def with_pages(self, num_pages: int) -> EngineConfig:
        return replace(self, num_pages=num_pages)

    @property
    def width(self) -> int:
        """N: most rows of a request in a round. Never below what the always available n-gram drafter needs."""
        drafts = max(c.max_draft_tokens for c in self.drafters.values())
        return 1 + drafts

    @property
    def drafters(self) -> dict[str, SpeculativeConfig]:
        """The configured method, and n-gram lookup: a request may choose between them."""
        configured = {} if self.speculative is None else {self.speculative.method: self.speculative}
        return {"ngram": replace(DEFAULT_NGRAM, rejection_sample_method=self.rejection_sample_method)} | configured

    @property
    def rejection_sample_method(self) -> str:
        return "exact" if self.speculative is None else self.speculative.rejection_sample_method

    @property
    def synthetic_acceptance_length(self) -> float | None:
        return None if self.speculative is None else self.speculative.synthetic_acceptance_length


def _device(device: Any) -> str:
    import torch

    available = torch.cuda.is_available()
    if device is None:
        return "cuda" if available else "cpu"
    choice("device", device, ["cuda", "cpu", None])
    if device == "cuda" and not available:
        raise ValueError("device = 'cuda' is not valid: there is no usable CUDA device (or torch was built without CUDA); it must be 'cpu' or None here")
    return device
