"""SmolLM2 in bfloat16 on the CPU, side by side in one run: transformers' generate (greedy, and with its prompt lookup), ours plain, ours with drafts (--spec),
and prefill of both. Rates of decoding are of the tokens after the first. Writes bench/results/cpu.json."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import torch
from demo import TITLES
from peer import Transformers
from results import Results, print_table
from rich.progress import track

from specrt import LLM, SamplingParams
from specrt.cli.measure import Timed, time_once
from specrt.cli.prompts import BUILT_IN, Prompt, load_prompts
from specrt.weights import open_checkpoint

PREFILL_TOKENS = 1000


class Rates:
    """Tokens and seconds by (mode, category), one entry a repeat."""

    def __init__(self, repeats: int):
        self.tokens: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * repeats)
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * repeats)

    def add(self, mode: str, category: str, repeat: int, tokens: int, seconds: float) -> None:
        for key in ((mode, category), (mode, "all")):
            self.tokens[key][repeat] += tokens
            self.seconds[key][repeat] += seconds

    def of(self, mode: str, category: str) -> list[float]:
        return [t / s for t, s in zip(self.tokens[mode, category], self.seconds[mode, category]) if t and s]


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def decode(llm: LLM, peer: Transformers, prompts: list[Prompt], max_tokens: int, repeats: int, lookup: int) -> Rates:
    rates = Rates(repeats)
    off, on = SamplingParams(max_tokens=max_tokens, speculative=False), SamplingParams(max_tokens=max_tokens)
    time_once(llm, prompts[0], on)
    ours = {(p.id, mode): Timed() for p in prompts for mode in ("off", "on")}
    for repeat in range(repeats):
        for prompt in track(prompts, description=f"decode, repeat {repeat + 1} of {repeats}", transient=True):
            for mode, params in (("off", off), ("on", on)):
                output, seconds = time_once(llm, prompt, params)
                ours[prompt.id, mode].add(output, seconds)
                rates.add(mode, prompt.category, repeat, len(output.token_ids) - 1, output.stats.decode_time or 0.0)
            if ours[prompt.id, "off"].token_ids != ours[prompt.id, "on"].token_ids:
                raise SystemExit(f"bench_cpu: speculation changed the output of {prompt.id}")
            ids = output.prompt_token_ids
            first = peer.generate([ids], 1)[1]
            for mode, options in (("transformers", {}), ("transformers prompt lookup", {"prompt_lookup_num_tokens": lookup})):
                (tokens,), seconds = peer.generate([ids], max_tokens, **options)
                if len(tokens) > 1:
                    rates.add(mode, prompt.category, repeat, len(tokens) - 1, seconds - first)
    return rates


def prefill(llm: LLM, peer: Transformers, repeats: int) -> tuple[int, list[float], list[float]]:
    """(prompt tokens, our tokens/s, the peer's tokens/s), one rate a repeat: the time to the first token of a long prompt."""
    text = "\n\n".join(p.text for p in load_prompts(BUILT_IN))
    ids = llm.tokenizer.encode(text)[:PREFILL_TOKENS]
    ours, theirs = [], []
    for repeat in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        llm.generate([ids], SamplingParams(max_tokens=1, speculative=False))
        mine = time.perf_counter() - start
        seconds = peer.generate([ids], 1)[1]
        if repeat:
            ours.append(len(ids) / mine)
            theirs.append(len(ids) / seconds)
    return len(ids), ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", default=BUILT_IN, help="JSON lines with 'category' and 'turns'")
    parser.add_argument("--category", action="append", help="only this category (may be given several times)")
    parser.add_argument("--limit", type=int, help="at most so many prompts a category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lookup", type=int, default=10, help="transformers' prompt_lookup_num_tokens")
    parser.add_argument("--spec", type=json.loads, default={"method": "ngram"}, help="our speculative_config, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    prompts = load_prompts(args.prompts, args.category, args.limit)
    results = Results("cpu.json")
    peer = Transformers(open_checkpoint(args.model), torch.bfloat16)
    with LLM(args.model, device="cpu", dtype="bfloat16", max_batch_size=1, speculative_config=args.spec) as llm:
        rates = decode(llm, peer, prompts, args.max_tokens, args.repeats, args.lookup)
        read = prefill(llm, peer, args.repeats) if args.prompts == BUILT_IN else None
    own = "" if args.prompts == BUILT_IN else f", {len(prompts)} of {Path(args.prompts).name}"
    shape = f"{args.model} bf16, batch 1, up to {args.max_tokens} tokens{own}"
    for category in [*dict.fromkeys(p.category for p in prompts), "all"]:
        plain, drafted = rates.of("off", category), rates.of("on", category)
        if not plain:
            continue
        where = f"{shape}, {category}"
        results.add("decode, plain", where, plain, "tokens/s", "transformers generate", middle(rates.of("transformers", category)))
        name = f"decode, {TITLES.get(args.spec['method'], args.spec['method'])}"
        results.add(name, where, drafted, "tokens/s", "specrt plain", middle(plain))
        results.add(name, where, drafted, "tokens/s", "transformers prompt lookup", middle(rates.of("transformers prompt lookup", category)))
    if read is not None:
        length, ours, theirs = read
        results.add("prefill", f"{args.model} bf16, {length} tokens", ours, "tokens/s", "transformers", middle(theirs))
    results.write()
    print_table(results.rows)


if __name__ == "__main__":
    main()
