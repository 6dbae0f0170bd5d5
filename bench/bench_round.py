"""Whole rounds of a model shape with random weights, on one GPU: what a round costs the device and the host.

    bench_round.py [--rows A,B] [--json FILE]                                          the rows of the evidence; --list names them
    bench_round.py --shape llama-8b --batch 8 --context 1024 --nodes 5 --acceptance 3.2   one round of one's own: a chain, or with --tree a tree
    bench_round.py --shape llama-8b --head eagle3 --nodes 60 --tree --topk 10             its drafts made by a head of random weights

Times of the device are medians of CUDA graph replays, by events, with the host's part hidden: the whole round as one graph, and its phases propose, verify, accept and
commit as a graph each. The committed length is set back before each replay. Then the engine runs for real: host time is what a step takes less what it waits for the
device; idle is the time on the stream between the end of a round's graph and the start of the next one's. Drafts are a tree of random tokens (free of
cost) or a head's (bench/heads.py), accepted to the length asked for (rejection_sample_method "synthetic"). The floor of a round is its weights (a head's as often
as they are read) and its committed KV over the read bandwidth that
bench_launch (make bench) measures first."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.shapes import SHAPES, TITLES  # noqa: E402

REPLAYS, WARM_UPS = 30, 5
STEPS, WARM_STEPS, BLOCKS = 250, 40, 5
HIDE_CYCLES = 4_000_000  # the stream is kept busy for so long while the host hands over what is timed
DEPTH = 8  # of random trees
VLLM = "vLLM 0.24, context 256, as recorded"


@dataclass(frozen=True)
class Case:
    """nodes: rows verified a request, root included; 1: plain decoding. acceptance: mean tokens a round. head: the method of a head of random weights that drafts, None: random
    tokens; topk: children of a node of its trees."""

    shape: str
    batch: int = 1
    context: int = 1024
    nodes: int = 1
    tree: bool = False
    acceptance: float = 1.0
    quantization: str | None = None
    head: str | None = None
    head_quantization: str | None = None
    topk: int = DEPTH
    kv_cache_dtype: str = "auto"

    @property
    def depth(self) -> int:
        """Most draft nodes on one path."""
        return 0 if self.nodes == 1 else min(DEPTH, self.nodes - 1) if self.tree else self.nodes - 1

    def __str__(self) -> str:
        weights = "bf16" if self.quantization is None else f"{self.quantization} weights (lm_head bf16)"
        drafts = "greedy" if self.nodes == 1 else f"{'tree' if self.tree else 'chain'} of {self.nodes} nodes, {self.acceptance:g} tokens a round"
        if self.head is not None:
            drafts += f", of an {self.head_quantization or 'bf16'} {self.head} head" + (f", depth {self.depth}, {self.topk} children a node" if self.tree else "")
        weights += ", FP8 keys and values" if self.kv_cache_dtype == "fp8" else ""
        return f"{TITLES.get(self.shape, self.shape)} {weights}, batch {self.batch}, context {self.context}, {drafts}"


@dataclass(frozen=True)
class Judged:
    case: Case
    figure: str  # "round", its phase "propose", or "drafter", that and "commit", which has the head read what was accepted (ms); "host" or "idle" (us)
    peer_value: float | None = None  # ms


ROWS = {
    "decode_step_b1_1k": Judged(Case("llama-8b"), "round", 6.66),
    "decode_step_b8_1k": Judged(Case("llama-8b", batch=8), "round", 6.82),
    "decode_step_b32_1k": Judged(Case("llama-8b", batch=32), "round", 7.40),
    "decode_step_fp8_b1_1k": Judged(Case("llama-8b", quantization="fp8"), "round"),
    "decode_step_fp8kv_b32_1k": Judged(Case("llama-8b", batch=32, kv_cache_dtype="fp8"), "round"),
    "verify_n64_b1_1k": Judged(Case("llama-8b", nodes=64, tree=True, acceptance=3.0), "round"),
    "round_host_time_b1": Judged(Case("llama-8b"), "host"),
    "round_gpu_idle_b1": Judged(Case("llama-8b"), "idle"),
    "llama1b_decode_step_b1": Judged(Case("llama-1b"), "round"),
    "eagle3_chain4_b1": Judged(Case("llama-8b", 1, 256, 5, acceptance=3.2, head="eagle3"), "round", 9.38),
    "eagle3_chain4_b8": Judged(Case("llama-8b", 8, 256, 5, acceptance=3.2, head="eagle3"), "round", 10.1),
    "eagle3_chain4_b32": Judged(Case("llama-8b", 32, 256, 5, acceptance=3.2, head="eagle3"), "round", 11.1),
    "eagle3_tree60_b1": Judged(Case("llama-8b", 1, 256, 60, True, 3.2, head="eagle3", head_quantization="fp8", topk=10), "round"),
    "eagle3_draft_step_bf16": Judged(Case("llama-8b", 1, 256, 5, acceptance=3.2, head="eagle3"), "propose"),
    "eagle3_draft_step_fp8": Judged(Case("llama-8b", 1, 256, 5, acceptance=3.2, head="eagle3", head_quantization="fp8"), "propose"),
    "eagle3_drafter_b1": Judged(Case("llama-8b", 1, 256, 5, acceptance=3.2, head="eagle3"), "drafter"),
    "peagle_chain4_b1": Judged(Case("llama-8b", 1, 256, 5, acceptance=3.2, head="peagle"), "round"),
    "peagle_drafter_b1": Judged(Case("llama-8b", 1, 256, 5, acceptance=3.2, head="peagle"), "drafter"),
    "mimo7b_mtp_round_b1": Judged(Case("mimo-7b", 1, 256, 2, acceptance=1.8, head="mtp"), "round"),
    "mimo7b_decode_step_b1": Judged(Case("mimo-7b", 1, 256), "round"),
}


# --- the engine under test ---


def random_parents(nodes: int, tree: bool) -> list[int]:
    """Parents of nodes 1.. in topological order: a chain, or a random tree of at most DEPTH levels."""
    if not tree:
        return list(range(nodes - 1))
    rng, depth, parents = random.Random(0), [0], []
    while len(parents) < nodes - 1:
        parent = rng.randrange(len(depth))
        if depth[parent] < DEPTH:
            parents.append(parent)
            depth.append(depth[parent] + 1)
    return parents


def random_drafter(nodes: int, tree: bool, vocab: int) -> Any:
    import torch

    from specrt.draft.base import Drafter

    class RandomTree(Drafter):
        """The same tree of random tokens for every slot and round."""

        def bind(self, state, pages, page_size, prefill_rows) -> None:
            super().bind(state, pages, page_size, prefill_rows)
            self.tokens = torch.randint(0, vocab, (state.batch, nodes - 1), dtype=torch.int32, device=state.device)
            self.parents = torch.tensor(random_parents(nodes, tree), dtype=torch.int32, device=state.device).expand(state.batch, -1).contiguous()

        def propose(self, slots: int, depth: int) -> None:
            s = self.state
            s.tree_token[:, 1:nodes].copy_(self.tokens)
            s.tree_parent[:, 1:nodes].copy_(self.parents)
            torch.mul(s.active, self.max_nodes + 1, out=s.tree_size)

    return RandomTree()


def head_drafter(case: Case, target: Any, growth: dict[str, Any]) -> Any:
    from bench.heads import random_head
    from specrt.draft.head import HeadDrafter
    from specrt.draft.peagle import PEagleDrafter
    from specrt.models.head import load_head

    head = random_head(case.head, target.config, target.device)
    model, boundaries = load_head(head, target, case.head_quantization), head.config.boundaries(target.num_layers)
    return PEagleDrafter(model, boundaries, 0, **growth) if case.head == "peagle" else HeadDrafter(model, boundaries, **growth)


class Bench:
    """An engine for a case, around a target that is there already."""

    def __init__(self, case: Case, target: Any):
        import torch

        from specrt.cache.pages import pages_for
        from specrt.config import EngineConfig
        from specrt.draft import DRAFTERS, growth
        from specrt.engine.engine import Engine
        from specrt.round.run import Round

        self.case, self.vocab = case, target.config.vocab_size
        drafters, spec, self.method = {}, None, None
        if case.nodes > 1:
            self.method = case.head or "random"
            DRAFTERS.setdefault("random", lambda **_: None)  # the config asks whether there is such a method
            size = dict(num_steps=DEPTH, eagle_topk=case.topk, num_draft_tokens=case.nodes) if case.tree else dict(num_speculative_tokens=case.nodes - 1)
            spec = {"method": self.method, **({"model": "random"} if case.head else {}), **size, "rejection_sample_method": "synthetic",
                    "synthetic_acceptance_length": case.acceptance}
        self.tokens = int((STEPS + WARM_STEPS) * case.acceptance)
        config = EngineConfig.parse(device=target.device.type, max_batch_size=case.batch, max_model_len=case.context + self.tokens + 64, speculative_config=spec)
        config = config.for_model(target.config.max_position_embeddings)
        if case.head is not None:
            drafters[case.head] = head_drafter(case, target, growth(config.speculative))
        elif spec:
            drafters["random"] = random_drafter(case.nodes, case.tree, self.vocab)
        config = config.with_pages(case.batch * pages_for(config.max_model_len + 2 * Round.slack_of(config.width, drafters), config.page_size))
        self.round = Round(target, drafters, config)
        for pool in [self.round.pool, *(d.pool for d in drafters.values() if hasattr(d, "pool"))]:
            for layer in (*pool.k, *pool.v):
                layer.copy_(torch.randn(layer.shape, device=layer.device))
        self.engine = Engine(self.round, None, config, self.vocab, ())
        self.speculation = None if spec else False
        self.head = drafters[case.head].model if case.head is not None else None

    def prompt(self, i: int) -> list[int]:
        rng = random.Random(i)
        return [rng.randrange(self.vocab) for _ in range(self.case.context)]

    def enter(self) -> None:
        """Every slot holds a request of the context's length, its KV left as it is: random."""
        from specrt import SamplingParams
        from specrt.round.setup import SlotSetup

        case, config = self.case, self.engine.config
        pages = config.num_pages // case.batch
        for slot in range(case.batch):
            self.round.admit(slot, SlotSetup(tokens=self.prompt(slot) + [1], prompt_len=case.context, seed=slot, params=SamplingParams(), stop_ids=(),
                                             method=self.method, num_speculative_tokens=case.nodes - 1, max_depth=case.depth, longest=config.max_model_len))
            self.round.set_pages(slot, list(range(slot * pages, (slot + 1) * pages)))
            self.round.activate(slot)

    def device_times(self) -> dict[str, list[float]]:
        """Seconds, one a replay: "round", and the phases by themselves."""
        self.enter()
        r, context = self.round, self.case.context
        r.launch().wait()  # eagerly: kernels are loaded, buffers made
        shape = r.shape()
        phases = {"propose": r.propose, "verify": r.verify, "accept": r.accept, "commit": r.commit}

        def whole() -> None:
            for phase in phases.values():
                phase(shape)

        whole_graph = r.graphs.capture(whole)
        graphs = {name: r.graphs.capture(lambda phase=phase: phase(shape)) for name, phase in phases.items()}

        def back() -> None:
            r.state.seq_lens.fill_(context)
            r.state.active.fill_(1)

        (times,) = replay_times([whole_graph], back)
        found = dict(zip(graphs, replay_times(list(graphs.values()), back)))
        for slot in range(self.case.batch):
            r.release(slot)
        return {"round": times, **found}

    def run(self, step: Callable[[int], None]) -> float:
        """Decodes through the engine, ``step(i)`` doing the i-th step once every request is in; tokens a second."""
        from specrt import SamplingParams

        params = SamplingParams(max_tokens=self.tokens, ignore_eos=True, seed=0, speculative=self.speculation)
        requests = [self.engine.prepare(self.prompt(i), params, i) for i in range(self.case.batch)]
        for request in requests:
            self.engine.add(request)
        while not all(request.active for request in requests):
            self.engine.step()
        for i in range(WARM_STEPS):
            self.engine.step()
        before, start = sum(len(r.output) for r in requests), time.perf_counter()
        for i in range(STEPS - WARM_STEPS):
            step(i)
        rate = (sum(len(r.output) for r in requests) - before) / (time.perf_counter() - start)
        for request in requests:
            self.engine.abort(request)
        return rate

    def host_times(self) -> tuple[list[float], float]:
        """Host seconds of each step, waiting for the device not counted; and tokens a second."""
        from specrt.round.result import PendingResult

        waited, times, wait = [0.0], [], PendingResult.wait

        def timed_wait(pending: Any) -> None:
            start = time.perf_counter()
            wait(pending)
            waited[0] += time.perf_counter() - start

        def step(_: int) -> None:
            waited[0], start = 0.0, time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - start - waited[0])

        PendingResult.wait = timed_wait
        try:
            return times, self.run(step)
        finally:
            PendingResult.wait = wait

    def idle_times(self) -> list[float]:
        """Seconds on the stream from the end of a round's graph to the start of the next one's: the copy of the results, and whatever the host is late by."""
        import torch

        graphs, marks = self.round.graphs, []
        run = graphs.run

        def marked(key: Any, function: Callable[[], None]) -> None:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run(key, function)
            end.record()
            marks.append((begin, end))

        graphs.run = marked
        try:
            self.run(lambda i: (marks.clear() if i == 0 else None, self.engine.step()))
        finally:
            graphs.run = run
        torch.cuda.synchronize()
        return [end.elapsed_time(begin) / 1e3 for (_, end), (begin, _) in zip(marks, marks[1:])]


def replay_times(graphs: list[Any], prepare: Callable[[], None]) -> list[list[float]]:
    """Seconds of each graph, replayed one after the other; one a repeat."""
    import torch

    times: list[list[float]] = [[] for _ in graphs]
    for repeat in range(WARM_UPS + REPLAYS):
        prepare()
        torch.cuda._sleep(HIDE_CYCLES)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(graphs) + 1)]
        marks[0].record()
        for graph, mark in zip(graphs, marks[1:]):
            graph.replay()
            mark.record()
        marks[-1].synchronize()
        if repeat >= WARM_UPS:
            for column, before, after in zip(times, marks, marks[1:]):
                column.append(before.elapsed_time(after) / 1e3)
    return times


# --- floors ---


def round_bytes(target: Any, case: Case, head: Any = None) -> int:
    """What a round must read: every weight of the target once (of the embedding a few rows: nothing), its committed keys and values, and ``head``'s weights."""
    c = target.config
    matrices = [m for layer in target.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [target.lm_head]
    weights = sum(tensor_bytes(m) for m in matrices)
    if head is not None:
        from bench.heads import head_bytes

        weights += head_bytes(head, case.depth, tensor_bytes)
    return weights + case.batch * case.context * 2 * c.num_layers * c.num_kv_heads * c.head_dim * target.kv_dtype.itemsize


def tensor_bytes(linear: Any) -> int:
    import torch

    return sum(t.numel() * t.element_size() for t in vars(linear).values() if isinstance(t, torch.Tensor))


def read_bandwidth(folder: Path) -> float:
    """Bytes a second, as the native benchmarks measure it."""
    binary = folder / "bench_launch"
    if not binary.exists():
        raise SystemExit(f"bench_round.py: {binary} is missing; `make bench` builds it (it measures the read bandwidth that floors stand on)")
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run([binary, "--rows", "read_4mb", "--json", file.name], check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(file.name).read_text().splitlines()[0])["read_bandwidth"]


# --- reports ---


def load_target(case: Case) -> Any:
    import torch

    from specrt.models.config import ModelConfig
    from specrt.models.dense import DenseModel
    from specrt.ops import FP8
    from tests.kit.tiny import random_checkpoint

    return DenseModel.load(random_checkpoint(ModelConfig.from_hf(SHAPES[case.shape]), device="cuda"), torch.bfloat16, torch.device("cuda"), case.quantization,
                           FP8 if case.kv_cache_dtype == "fp8" else None)


def spread(values: list[float]) -> float:
    return (max(values) - min(values)) / median(values)


def blocks(values: list[float]) -> list[float]:
    """Medians of BLOCKS parts of a run, so that a single late step is no spread."""
    size = len(values) // BLOCKS
    return [median(values[i * size : (i + 1) * size]) for i in range(BLOCKS)]


def show(case: Case, target: Any, bandwidth: float) -> None:
    """Everything about one round, for people."""
    bench = Bench(case, target)
    floor = round_bytes(target, case, bench.head) / bandwidth * 1e3
    times = {name: median(values) * 1e3 for name, values in bench.device_times().items()}
    host, rate = bench.host_times()
    idle = bench.idle_times()
    phases = ", ".join(f"{name} {value:.3f}" for name, value in times.items() if name != "round")
    print(f"{case}\n  round {times['round']:.3f} ms ({phases}); floor {floor:.3f} ms, share {floor / times['round']:.3f}\n  host {median(host) * 1e6:.0f} us a round, "
          f"GPU idle between rounds {median(idle) * 1e6:.1f} us, {rate:.0f} tokens/s", flush=True)


def measure(name: str, bench: Bench, target: Any, bandwidth: float) -> dict[str, Any]:
    judged = ROWS[name]
    floor = None
    if judged.figure == "round":
        values, scale, unit = bench.device_times()["round"], 1e3, "ms"
        floor = round_bytes(target, judged.case, bench.head) / bandwidth * scale
    elif judged.figure in ("propose", "drafter"):
        times = bench.device_times()
        values = times["propose"] if judged.figure == "propose" else [a + b for a, b in zip(times["propose"], times["commit"])]
        scale, unit = 1e3, "ms"
    else:
        values, scale, unit = blocks(bench.host_times()[0] if judged.figure == "host" else bench.idle_times()), 1e6, "us"
    import torch

    return {"machine": torch.cuda.get_device_name(), "name": name, "shape": str(judged.case), "value": median(values) * scale, "unit": unit, "floor": floor,
            "peer": VLLM if judged.peer_value else None, "peer_value": judged.peer_value, "spread": spread(values), "read_bandwidth": bandwidth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--rows", help="names, with commas between them; all by default")
    parser.add_argument("--json", help="one JSON object a row, a line each, as they are measured")
    parser.add_argument("--bin", type=Path, default=ROOT / "build" / "bin", help="the folder of the native benchmarks")
    parser.add_argument("--shape", choices=SHAPES, help="measure one round of this shape, instead of rows")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--nodes", type=int, default=1, help="rows verified a request, root included; 1 = plain decoding")
    parser.add_argument("--tree", action="store_true", help="a random tree instead of a chain")
    parser.add_argument("--quantization", choices=["fp8"], help="of the weights, at load")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto", help="of keys and values, a head's too")
    parser.add_argument("--head", choices=["eagle", "eagle3", "peagle", "mtp"], help="drafts of a head of random weights instead of random tokens")
    parser.add_argument("--head-quantization", choices=["fp8"], help="of the head's weights")
    parser.add_argument("--topk", type=int, default=DEPTH, help="children of a node of the head's trees")
    parser.add_argument("--acceptance", type=float, default=1.0, help="mean tokens a round")
    a = parser.parse_args()
    if a.list:
        print("\n".join(ROWS))
        return
    names = a.rows.split(",") if a.rows else list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise SystemExit(f"bench_round.py: no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    bandwidth = read_bandwidth(a.bin)
    if a.shape:
        case = Case(a.shape, a.batch, a.context, a.nodes, a.tree, a.acceptance, a.quantization, a.head, a.head_quantization, a.topk, a.kv_cache_dtype)
        show(case, load_target(case), bandwidth)
        return
    target, loaded, made = None, None, None
    with open(a.json or "/dev/null", "w", encoding="utf-8") as file:
        for name in sorted(names, key=lambda n: (ROWS[n].case.shape, str(ROWS[n].case))):
            case = ROWS[name].case
            if made is None or made.case != case:
                made = None  # its memory is needed
                if loaded != (case.shape, case.quantization, case.kv_cache_dtype):
                    target = None
                    target, loaded = load_target(case), (case.shape, case.quantization, case.kv_cache_dtype)
                made = Bench(case, target)
            row = measure(name, made, target, bandwidth)
            share = f", floor {row['floor']:.3f}, floor / value {row['floor'] / row['value']:.3f}" if row["floor"] else ""
            print(f"{name}: {row['value']:.3f} {row['unit']}{share}, spread {row['spread']:.1%}  ({row['shape']})", flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
