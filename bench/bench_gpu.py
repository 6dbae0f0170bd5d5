"""What the CUDA backend does so far, on one GPU, cold weights, CUDA-graph timed; writes bench/results/<card>.json.

    linear_bf16_m*: every linear layer and lm_head of the Llama-3.1-8B shape (15 GB of distinct weights), beside cuBLAS (torch.mm) in the same run; floor: the
    bytes over the read bandwidth measured in the run. prefill_linear_bf16_m4096: one layer's. decode_attention, verify_attention: a layer, beside torch's
    scaled_dot_product_attention over contiguous keys; floor: a graph-timed pure read of the same bytes. decode_tokens: SmolLM2-135M end to end, off and with n-gram drafts."""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Callable

import torch
import torch.nn.functional as F
from results import Results, card, print_table

from specrt import LLM, SamplingParams, ops

DEVICE = "cuda"
LAYERS, HIDDEN, INTER, HEADS, KV_HEADS, DIM, VOCAB = 32, 4096, 14336, 32, 8, 128, 128256
SHAPES = [(6144, HIDDEN), (HIDDEN, HIDDEN), (2 * INTER, HIDDEN), (HIDDEN, INTER)]  # qkv, o, gate and up, down: [N, K]


def graph_times(run: Callable[[], None], repeats: int = 10) -> list[float]:
    """Seconds a replay of ``run`` captured in a graph, one a repeat."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times[2:]


def rows_of(n: int) -> torch.Tensor:
    return torch.tensor([n], dtype=torch.int32, device=DEVICE)


def linears(results: Results) -> None:
    weights = [[torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16).mul_(k**-0.5) for n, k in SHAPES] for _ in range(LAYERS)]
    head = torch.randn(VOCAB, HIDDEN, device=DEVICE, dtype=torch.bfloat16).mul_(HIDDEN**-0.5)
    every = [w for layer in weights for w in layer] + [head]
    size = sum(w.numel() * 2 for w in every)
    big = torch.empty(size // 4, dtype=torch.float32, device=DEVICE)
    floor = median(graph_times(lambda: torch.sum(big)))  # a pure read of as many bytes
    print(f"read bandwidth {size / floor / 1e12:.2f} TB/s over {size / 1e9:.1f} GB", flush=True)
    del big
    for m in (1, 8, 32, 64, 128, 256):
        inputs = {k: torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16) for k in (HIDDEN, INTER)}
        outs = {w.shape[0]: torch.empty(m, w.shape[0], device=DEVICE, dtype=torch.bfloat16) for w in every[:-1]}
        logits, half, n = torch.empty(m, VOCAB, device=DEVICE), torch.empty(m, VOCAB, device=DEVICE, dtype=torch.bfloat16), rows_of(m)

        def ours() -> None:
            for w in every:
                ops.linear(inputs[w.shape[1]], w, None, n, logits if w is head else outs[w.shape[0]])

        def cublas() -> None:
            for w in every:
                torch.mm(inputs[w.shape[1]], w.t(), out=half if w is head else outs[w.shape[0]])

        peer = median(graph_times(cublas)) * 1e3
        add(results, f"linear_bf16_m{m}", "Llama-3.1-8B, all layers + lm_head", [t * 1e3 for t in graph_times(ours)], "ms", "cuBLAS", peer, floor * 1e3)
    m, layer = 4096, weights[0]
    inputs = {k: torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16) for k in (HIDDEN, INTER)}
    outs, n = {w.shape[0]: torch.empty(m, w.shape[0], device=DEVICE, dtype=torch.bfloat16) for w in layer}, rows_of(m)
    peer = median(graph_times(lambda: [torch.mm(inputs[w.shape[1]], w.t(), out=outs[w.shape[0]]) for w in layer])) * 1e3
    values = graph_times(lambda: [ops.linear(inputs[w.shape[1]], w, None, n, outs[w.shape[0]]) for w in layer])
    add(results, "prefill_linear_bf16_m4096", "Llama-3.1-8B, one layer", [t * 1e3 for t in values], "ms", "cuBLAS", peer, None)


def attention(results: Results) -> None:
    page, copies = 64, 24  # distinct KV, rotated, so that it does not come from L2
    for name, batch, context, nodes in (("decode_attention_b1_1k", 1, 1024, 1), ("decode_attention_b1_16k", 1, 16384, 1), ("decode_attention_b32_1k", 32, 1024, 1),
                                        ("verify_attention_n64_b1_1k", 1, 1024, 64), ("verify_attention_n64_b1_4k", 1, 4096, 64), ("verify_attention_n64_b8_1k", 8, 1024, 64)):
        per = context // page + 2
        pools = [torch.randn(2, batch * per, KV_HEADS, page, DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
        table = torch.arange(batch * per, dtype=torch.int32, device=DEVICE).view(batch, per)
        rows = batch * nodes
        q = torch.randn(rows, HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        out, n = torch.empty_like(q), rows_of(rows)
        request = torch.arange(batch, dtype=torch.int32, device=DEVICE).repeat_interleave(nodes)
        prefix = torch.full((rows,), context, dtype=torch.int32, device=DEVICE)
        words = [1]
        for i in range(1, nodes):  # a binary tree
            words.append(words[(i - 1) // 2] | 1 << i)
        ancestors = torch.tensor([w - (1 << 64) if w >> 63 else w for w in words], dtype=torch.int64, device=DEVICE).repeat(batch)
        workspace = ops.attention_workspace(rows, HEADS, DIM, per * page, DEVICE)
        read = [p.view(-1).view(torch.int32) for p in pools]
        floor = median(graph_times(lambda: [r.max() for r in read])) / copies * 1e6
        ks = [p[0, : batch * (context // page)].view(batch, context // page, KV_HEADS, page, DIM).transpose(1, 2).reshape(batch, KV_HEADS, context, DIM) for p in pools[:4]]
        vs = [p[1, : batch * (context // page)].view(batch, context // page, KV_HEADS, page, DIM).transpose(1, 2).reshape(batch, KV_HEADS, context, DIM) for p in pools[:4]]
        qs = q.view(batch, nodes, HEADS, DIM).transpose(1, 2).contiguous()
        peer = median(graph_times(lambda: [F.scaled_dot_product_attention(qs, k, v, enable_gqa=True) for k, v in zip(ks, vs)])) / len(ks) * 1e6
        values = graph_times(lambda: [ops.tree_attention(q, p[0], p[1], table, request, prefix, ancestors, None, DIM**-0.5, 0, n, workspace, out) for p in pools])
        add(results, name, f"32/8 heads of 128, page {page}", [t / copies * 1e6 for t in values], "us", "torch SDPA (committed keys only)", peer, floor)
    rows, context = 4096, 4096
    k_pool, v_pool = torch.randn(2, context // page, KV_HEADS, page, DIM, device=DEVICE, dtype=torch.bfloat16)
    table = torch.arange(context // page, dtype=torch.int32, device=DEVICE)[None]
    q = torch.randn(rows, HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
    request, prefix = torch.zeros(rows, dtype=torch.int32, device=DEVICE), torch.arange(1, rows + 1, dtype=torch.int32, device=DEVICE)
    out, n = torch.empty_like(q), rows_of(rows)
    k, v = (p.transpose(0, 1).reshape(1, KV_HEADS, context, DIM) for p in (k_pool, v_pool))
    qs = q.transpose(0, 1)[None].contiguous()
    peer = median(graph_times(lambda: F.scaled_dot_product_attention(qs, k, v, is_causal=True, enable_gqa=True))) * 1e6
    values = graph_times(lambda: ops.prefill_attention(q, k_pool, v_pool, table, request, prefix, DIM**-0.5, 0, n, out))
    add(results, "prefill_attention_4k", "32/8 heads of 128, causal", [t * 1e6 for t in values], "us", "torch SDPA", peer, None)


def end_to_end(results: Results, model: str) -> None:
    """Rounds run eagerly so far: these are host-bound."""
    text = "Repeat this text. " + "The river Elbe rises in the Giant Mountains and flows to the North Sea; ships carry goods on it from Hamburg to Prague. " * 6
    params = SamplingParams(max_tokens=128, ignore_eos=True)
    for batch in (1, 8, 32):
        plain = None
        for name, spec in (("off", None), ("ngram", {"method": "ngram"})):
            with LLM(model, device="cuda", max_batch_size=batch, max_model_len=2048, speculative_config=spec) as llm:
                values = []
                for _ in range(4):
                    start = time.perf_counter()
                    outs = llm.generate([[{"role": "user", "content": text}]] * batch, params, chat=True)
                    values.append((time.perf_counter() - start) / sum(len(o.token_ids) for o in outs) * 1e6)
            add(results, f"decode_{name}_b{batch}", f"{model} bf16, a repeating text, 128 tokens each", values[1:], "us/token", plain and "specrt, off", plain, None)
            plain = plain or median(values[1:])


def add(results: Results, name: str, shape: str, values: list[float], unit: str, peer: str | None, peer_value: float | None, floor: float | None) -> None:
    row = results.add(name, shape, values, unit, peer, peer_value, floor)
    print(name, f"{row['value']:.4g} {unit}", f"peer {peer_value:.4g}" if peer_value else "", f"share of floor {row['share_of_floor']:.2f}" if floor else "", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    results = Results(f"{card()}.json", "cuda")
    torch.manual_seed(0)
    for part in (attention, linears, lambda r: end_to_end(r, args.model)):
        part(results)
        results.write()
        torch.cuda.empty_cache()
    print_table(results.rows)


if __name__ == "__main__":
    main()
