"""The time to a prompt's first token, through the engine, for a model shape with random weights on one GPU; beside transformers' forward pass (SDPA) of a model of that shape.

    bench_prefill.py [--rows A,B] [--json FILE]    the rows of the evidence; --list names them"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.bench_round import Bench, Case, load_target, read_bandwidth, spread  # noqa: E402
from bench.shapes import SHAPES, TITLES  # noqa: E402

ROWS = {"first_token_b1_4k": Case("llama-8b", context=4096)}
REPEATS, WARM_UPS = 7, 2


def milliseconds(run: Callable[[int], None]) -> list[float]:
    import torch

    times = []
    for i in range(WARM_UPS + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(i)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times[WARM_UPS:]


def ours(case: Case) -> list[float]:
    from specrt import SamplingParams

    bench = Bench(case, load_target(case))

    def first_token(i: int) -> None:
        request = bench.engine.prepare(bench.prompt(i), SamplingParams(max_tokens=1, ignore_eos=True), i)
        bench.engine.add(request)
        while not request.output:
            bench.engine.step()

    return milliseconds(first_token)


def transformers(case: Case) -> list[float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[case.shape])).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (1, case.context), device="cuda")

    @torch.inference_mode()
    def forward(i: int) -> None:
        model(ids, logits_to_keep=1).logits.argmax(-1).item()

    return milliseconds(forward)


def measure(name: str, bandwidth: float) -> dict[str, Any]:
    import torch

    case = ROWS[name]
    values, theirs = ours(case), transformers(case)
    shape = f"{TITLES[case.shape]} bf16, a prompt of {case.context} tokens"
    return {"machine": torch.cuda.get_device_name(), "name": name, "shape": shape, "value": median(values), "unit": "ms", "floor": None, "peer": "transformers, SDPA",
            "peer_value": median(theirs), "spread": spread(values), "read_bandwidth": bandwidth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--rows", default=",".join(ROWS), help="names, with commas between them; all by default")
    parser.add_argument("--json", default="/dev/null", help="one JSON object a row, a line each, as they are measured")
    parser.add_argument("--bin", type=Path, default=ROOT / "build" / "bin", help="the folder of the native benchmarks")
    a = parser.parse_args()
    if a.list:
        print("\n".join(ROWS))
        return
    names = a.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise SystemExit(f"bench_prefill.py: no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    bandwidth = read_bandwidth(a.bin)
    with open(a.json, "w", encoding="utf-8") as file:
        for name in names:
            row = measure(name, bandwidth)
            print(f"{name}: {row['value']:.1f} ms, {row['peer']} {row['peer_value']:.1f}, spread {row['spread']:.1%}  ({row['shape']})", flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
