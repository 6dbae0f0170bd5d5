"""Linear layers on the CPU: GB/s of weights at few rows, GFLOP/s at many, beside a plain read of memory and torch's own linear.

    python bench/bench_linear_cpu.py [--dtype bfloat16|float32]

A call of few rows reads another copy of the weight each time (30 "layers"), as a decode step does, so that nothing stays in the cache.
"""

import argparse
import statistics
import time

import torch

from specrt import ops

SMOLLM2 = [(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152)]  # (K, N): qkv, o, gate_up, down, lm_head
LARGE = [(576, 3072), (1536, 576), (1024, 1024), (4096, 4096)]


def median_seconds(run, repeats: int) -> tuple[float, float]:
    """Median and spread ((max - min) / median) of the seconds of ``run()``."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def layer(k: int, n: int, m: int, dtype: torch.dtype):
    x, out = torch.randn(m, k).to(dtype), torch.empty(m, n, dtype=dtype)
    return x, ops.pack_linear(torch.randn(n, k).to(dtype)), None, torch.tensor([m], dtype=torch.int32), out


def read_bandwidth(repeats: int) -> float:
    """GB/s of summing 256 MB with all threads."""
    data = torch.ones(32 << 20, dtype=torch.int64)
    return data.nbytes / median_seconds(lambda: data.sum(), repeats)[0] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(f"{torch.get_num_threads()} threads, {args.dtype}; plain read of memory {read_bandwidth(args.repeats):.1f} GB/s")
    print(f"{'K':>6}{'N':>7}{'M':>6}{'us':>10}{'GB/s':>8}{'GFLOP/s':>9}{'spread':>8}")

    def report(k, n, m, seconds, spread):
        print(f"{k:>6}{n:>7}{m:>6}{seconds * 1e6:>10.1f}{n * k * dtype.itemsize / seconds / 1e9:>8.1f}{2e-9 * m * n * k / seconds:>9.1f}{spread:>8.0%}")

    for k, n in SMOLLM2:
        copies = 30 if n < 10000 else 2
        for m in (1, 8, 16):
            calls = [layer(k, n, m, dtype) for _ in range(copies)]
            seconds, spread = median_seconds(lambda: [ops.linear(*c) for c in calls], args.repeats)
            report(k, n, m, seconds / copies, spread)
    for m in (1, 8, 16):
        calls = [layer(k, n, m, dtype) for _ in range(30) for k, n in SMOLLM2[:4]] + [layer(*SMOLLM2[4], m, dtype)]
        seconds, spread = median_seconds(lambda: [ops.linear(*c) for c in calls], args.repeats)
        read = sum(c[1].nbytes for c in calls)
        print(f"SmolLM2-135M, all {len(calls)} linear layers, M = {m}: {seconds * 1e3:.2f} ms, {read / seconds / 1e9:.1f} GB/s, spread {spread:.0%}")
    for k, n in LARGE:
        for m in (512, 2048):
            call = layer(k, n, m, dtype)
            report(k, n, m, *median_seconds(lambda: ops.linear(*call), args.repeats))
            weight = torch.randn(n, k).to(dtype)
            seconds, _ = median_seconds(lambda: torch.nn.functional.linear(call[0], weight), args.repeats)
            print(f"{'torch':>10}: {2e-9 * m * n * k / seconds:.1f} GFLOP/s")


if __name__ == "__main__":
    main()
