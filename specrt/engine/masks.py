"""Token masks of a tree's nodes, by a request's ``token_mask`` callable."""

from __future__ import annotations

from typing import Any

import numpy as np

from specrt.engine.request import Request


def node_masks(request: Request, tokens: list[int], parents: list[int], vocab_size: int) -> np.ndarray:
    """bool [nodes, V]: what may follow each node (True). The callable gets the output so far with the node's own path.

    It is not asked about paths that cannot be part of the output (a token its own earlier mask forbids, or tokens behind an end or max_tokens): a grammar would
    have no answer. Those nodes allow everything; no walk gets past the token that is forbidden or ends the output. ValueError for a result that is no
    mask; whatever the callable raises passes through."""
    masks = np.ones((len(tokens), vocab_size), dtype=bool)
    paths: list[list[int] | None] = []
    for node, parent in enumerate(parents):
        path = request.output if node == 0 else _extended(request, paths[parent], masks[parent], tokens[node])
        paths.append(path)
        if path is not None:
            masks[node] = _as_mask(request.params.token_mask(list(path)), vocab_size)
    return masks


def _extended(request: Request, path: list[int] | None, mask: np.ndarray, token: int) -> list[int] | None:
    if path is None or not mask[token] or request.ends_with(token, len(path)) or len(path) + 1 >= request.max_tokens:
        return None
    return path + [token]


def _as_mask(value: Any, vocab_size: int) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor, perhaps on a device
        value = value.detach().cpu()
    mask = np.asarray(value)
    if mask.dtype != np.bool_ or mask.shape != (vocab_size,):
        raise ValueError(f"token_mask must return a bool mask of shape ({vocab_size},), got {mask.dtype} of shape {mask.shape}")
    return mask
