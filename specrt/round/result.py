"""What the host reads of a round: the only module under round/ that copies from the device.

The results of a round are copied into a ring of pinned buffers behind the round, on its stream, and read when the host needs them: a round late."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specrt.round.state import LogprobRows, RoundState

RING = 2  # the round in flight, and the one launched before it is read


@dataclass
class RoundResult:
    """Host data of one round (numpy), valid until RING further rounds are launched. B slots, N nodes."""

    path_len: np.ndarray  # int32 [B]: tokens emitted, 0 = not in the round (or an error at once)
    emitted: np.ndarray  # int32 [B, N]
    error: np.ndarray  # int32 [B]: ops.STATUS_*
    tree_size: np.ndarray  # int32 [B]
    tree_depth: np.ndarray  # int32 [B, N]
    chosen: np.ndarray | None  # float32 [B, N]: log-probability of each emitted token, where a request asked
    top_token: np.ndarray | None  # int32 [B, N, n]
    top_logprob: np.ndarray | None  # float32 [B, N, n]


class PendingResult:
    """A round's place in the ring. ``read`` waits for that round (not for later ones)."""

    def __init__(self, state: RoundState):
        self._pinned = state.device.type == "cuda"
        self._readback = torch.empty(state.readback.shape, dtype=torch.int32, pin_memory=self._pinned)
        flat = self._readback.numpy()
        self._views = {name: flat[at : at + int(np.prod(shape))].reshape(shape) for name, (at, shape) in state.readback_views.items()}
        self._done = torch.cuda.Event() if self._pinned else None
        self._buffers: dict[tuple[int, int], LogprobRows] = {}  # for log-probabilities, by their shape
        self._logprobs: LogprobRows | None = None

    def fill(self, state: RoundState, logprobs: LogprobRows | None) -> None:
        self._readback.copy_(state.readback, non_blocking=True)
        self._logprobs = None
        if logprobs is not None:
            key = logprobs.rows, logprobs.top
            if key not in self._buffers:
                self._buffers[key] = LogprobRows(*key, torch.device("cpu"), pinned=self._pinned)
            self._logprobs = self._buffers[key]
            self._logprobs.flat.copy_(logprobs.flat, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def read(self) -> RoundResult:
        self.wait()
        v, p = self._views, self._logprobs
        chosen = top_token = top_logprob = None
        if p is not None:  # row row_offset[b] + path[b, i] chose emitted[b, i]
            rows = np.clip(v["row_offset"][:-1, None] + v["path"], 0, p.rows - 1)
            chosen, top_token, top_logprob = (t.numpy()[rows] for t in (p.chosen, p.top_token, p.top_logprob))
        return RoundResult(v["path_len"], v["emitted"], v["error"], v["tree_size"], v["tree_depth"], chosen, top_token, top_logprob)


class ResultRing:
    """A place is used again RING rounds later. The copy into it is ordered behind the read by the host's own order (it reads round i before it launches round i + 2),
    and the device buffers are not overwritten early because the next round runs behind the copy on the same stream."""

    def __init__(self, state: RoundState):
        self._state, self._places, self._next = state, [PendingResult(state) for _ in range(RING)], 0

    def push(self, logprobs: LogprobRows | None) -> PendingResult:
        """Enqueues the copy of the round just launched."""
        place = self._places[self._next]
        self._next = (self._next + 1) % RING
        place.fill(self._state, logprobs)
        return place


def read_columns(parts: list[tuple[Tensor, ...]]) -> tuple[np.ndarray, ...]:
    """Prompt log-probabilities: tuples of tensors, one a chunk, joined column by column."""
    return tuple(torch.cat(column).numpy(force=True) for column in zip(*parts))


def read_tree(state: RoundState, slot: int) -> tuple[list[int], list[int]]:
    """Tokens and parents of a slot's tree; waits for the device."""
    size = int(state.tree_size[slot])
    return state.tree_token[slot, :size].tolist(), state.tree_parent[slot, :size].tolist()
