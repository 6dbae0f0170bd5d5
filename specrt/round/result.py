"""What the host reads of a round: the only module under round/ that copies from the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specrt.round.state import RoundState


@dataclass
class RoundResult:
    """Host data of one round (numpy). B slots, N nodes."""

    path_len: np.ndarray  # int32 [B]: tokens emitted, 0 = not in the round (or an error at once)
    emitted: np.ndarray  # int32 [B, N]
    error: np.ndarray  # int32 [B]: ops.STATUS_*
    tree_size: np.ndarray  # int32 [B]
    tree_token: np.ndarray  # int32 [B, N]
    tree_depth: np.ndarray  # int32 [B, N]
    path: np.ndarray  # int32 [B, N]
    chosen: np.ndarray | None  # float32 [B, N]: log-probability of each emitted token, where a request asked
    top_token: np.ndarray | None  # int32 [B, N, n]
    top_logprob: np.ndarray | None  # float32 [B, N, n]


def read_columns(parts: list[tuple[Tensor, ...]]) -> tuple[np.ndarray, ...]:
    """Prompt log-probabilities: tuples of tensors, one a chunk, joined column by column."""
    return tuple(torch.cat(column).numpy(force=True) for column in zip(*parts))


def read_tree(state: RoundState, slot: int) -> tuple[list[int], list[int]]:
    size = int(state.tree_size[slot])
    return state.tree_token[slot, :size].tolist(), state.tree_parent[slot, :size].tolist()


def read_round(state: RoundState, logprobs: tuple[Tensor, Tensor, Tensor] | None) -> RoundResult:
    flat = state.readback.cpu().numpy().copy()
    v = {name: flat[at : at + int(np.prod(shape))].reshape(shape) for name, (at, shape) in state.readback_views.items()}
    chosen = top_token = top_logprob = None
    if logprobs is not None:
        last = logprobs[0].shape[0] - 1
        rows = np.clip(v["row_offset"][:-1, None] + v["path"], 0, last)
        chosen, top_token, top_logprob = (t.cpu().numpy()[rows] for t in logprobs)
    return RoundResult(v["path_len"], v["emitted"], v["error"], v["tree_size"], v["tree_token"], v["tree_depth"], v["path"], chosen, top_token, top_logprob)
