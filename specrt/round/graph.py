"""CUDA graphs of rounds and prompt chunks: one for each shape that recurs."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

MOST_GRAPHS = 64


@dataclass(frozen=True)
class RoundShape:
    """All that the host's control flow in a round depends on: two rounds of one shape are the same sequence of launches with the same arguments, so that a
    graph of one serves the other. Who is in which slot, and everything else, is in device buffers that never move."""

    rows: int  # capacity of the packed rows, a bucket (layers.batch.row_bucket)
    drafts: tuple[tuple[str, int, int], ...]  # (drafter, its slots, a bucket; the deepest draft among them) of the drafters that have a slot
    logprobs: int | None  # most top log-probabilities wanted, a bucket; None = nobody wants any
    masked: bool  # some rows have token masks
    logits: bool  # some row needs its logits; False = lm_head chooses the tokens, to the same bits (ops.linear_sample)


class RoundGraphs:
    """Runs a function of a key: eagerly the first time, from a graph from the second time on.

    The first, eager run is a round like any other; it also loads every kernel and sets its attributes, which must not happen during a capture. The
    second run is captured, which executes nothing and so leaves the state as it is, then launched. A shape that comes once costs no capture.

    The graphs share one memory pool for the temporaries of torch's ops. That is sound because none of them outlives its graph (what does outlive it lies in buffers
    made before), and graphs run one after the other on one stream. At most MOST_GRAPHS are kept, the least recently used goes first."""

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()
        if enabled:
            self._settle = weakref.finalize(self, torch.cuda.synchronize, device)  # a graph is not destroyed while it runs

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """``function`` may not read the device, and must do the same launches whenever it is called with this key."""
        if not self.enabled:
            function()
        elif key not in self.graphs:
            self._make_room()
            self.graphs[key] = None
            function()
        else:
            graph = self.graphs[key]
            if graph is None:
                graph = self.graphs[key] = self.capture(function)
            self.graphs.move_to_end(key)
            graph.replay()

    def capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Not by ``with torch.cuda.graph``, which waits for the device, collects garbage and empties the allocator's cache: the round before is still running."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        collects = gc.isenabled()
        gc.disable()  # what it would free could wait for the device, which a capture forbids
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self._pool(), capture_error_mode="thread_local")  # other threads of the process may use CUDA meanwhile
                try:
                    function()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph

    def _pool(self) -> tuple[int, int]:
        """The pool of the graphs there are: it ends with the last of them."""
        return next((graph.pool() for graph in self.graphs.values() if graph is not None), None) or torch.cuda.graph_pool_handle()

    def _make_room(self) -> None:
        while len(self.graphs) >= MOST_GRAPHS:
            torch.cuda.synchronize()
            self.graphs.popitem(last=False)
