"""torch's scaled_dot_product_attention beside the rows of bench_attention: the same heads and lengths over contiguous keys, timed in a CUDA graph."""

from __future__ import annotations

import re
from statistics import median
from typing import Callable

HEADS, KV_HEADS, DIM = 32, 8, 128
ROW = re.compile(r"(decode|verify|prefill)_attention_(?:n(?P<nodes>\d+)_)?(?:b(?P<batch>\d+)_)?(?P<k>\d+)k")


def graph_seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """The median time of a replay of ``run`` captured in a graph."""
    import torch

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[2:])


def peer(name: str) -> tuple[str, float] | None:
    """(what it is, microseconds a layer) for the attention row called ``name``; None for other rows, or where torch has no GPU.
    Decode and verify: SDPA sees the committed keys only, unmasked, which is less work than ours."""
    fields = ROW.fullmatch(name)
    if not fields:
        return None
    import torch
    import torch.nn.functional as F

    if not torch.cuda.is_available():
        return None
    batch, nodes, context = int(fields["batch"] or 1), int(fields["nodes"] or 1), int(fields["k"]) * 1024
    causal = fields[1] == "prefill"
    copies = 1 if causal else max(8, 200_000_000 // (batch * context * KV_HEADS * DIM * 4) + 1)
    q = torch.randn(batch, HEADS, context if causal else nodes, DIM, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(copies, batch, KV_HEADS, context, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = graph_seconds(lambda: [F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True) for k, v in zip(keys, values)])
    del q, keys, values
    torch.cuda.empty_cache()
    return "torch SDPA" if causal else "torch SDPA (committed keys only)", seconds / copies * 1e6
