"""SmolLM2-135M end to end on one GPU, on real prompts: speculation off, n-gram drafts, and the EAGLE-3 head that comes with the package (a chain of 4, a tree of 60), beside
transformers' generate (greedy, and with its prompt lookup, which takes one prompt at a time) in the same run, on the first prompts, as it is slow. Microseconds a token, prompts
included; outputs of the modes are compared. Batches larger than the number of prompts are left out. Writes bench/results/<card>.json. (Kernels: bench/native.)"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from peer import Transformers
from results import Results, card, print_table

from specrt import LLM, SamplingParams
from specrt.cli.prompts import BUILT_IN, load_prompts
from specrt.heads import shipped_for
from specrt.weights import open_checkpoint

LOOKUP = 10  # transformers' prompt_lookup_num_tokens
PEER_PROMPTS = 8  # at least so many, and one batch


def modes(model: str) -> dict[str, dict[str, Any] | None]:
    head = {"method": "eagle3"}
    heads = {"eagle3_chain4": head | {"num_speculative_tokens": 4}, "eagle3_tree60": head | {"num_steps": 8, "eagle_topk": 10, "num_draft_tokens": 60}}
    return {"off": None, "ngram": {"method": "ngram"}} | (heads if shipped_for(model, "eagle3") else {})


def ours(model: str, spec: dict[str, Any] | None, batch: int, messages: list[Any], params: SamplingParams, repeats: int) -> tuple[list[Any], list[float]]:
    """(the outputs, us a token of each repeat)."""
    values = []
    with LLM(model, device="cuda", max_batch_size=batch, max_model_len=2048, speculative_config=spec) as llm:
        for _ in range(repeats + 1):  # the first warms up
            start = time.perf_counter()
            outputs = llm.generate(messages, params, chat=True)
            values.append((time.perf_counter() - start) / sum(len(o.token_ids) for o in outputs) * 1e6)
    return outputs, values[1:]


def theirs(peer: Transformers, prompts: list[list[int]], batch: int, max_tokens: int, **options: Any) -> float:
    """us a token."""
    peer.generate(prompts[:batch], 8, **options)
    tokens, seconds = 0, 0.0
    for at in range(0, len(prompts), batch):
        rows, took = peer.generate(prompts[at : at + batch], max_tokens, **options)
        tokens, seconds = tokens + sum(map(len, rows)), seconds + took
    return seconds / tokens * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", default=BUILT_IN, help="JSON lines with 'category' and 'turns'")
    parser.add_argument("--limit", type=int, help="at most so many prompts a category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    messages = [p.messages for p in load_prompts(args.prompts, None, args.limit)]
    params = SamplingParams(max_tokens=args.max_tokens)
    results = Results(f"{card()}.json", "cuda", unique=("name",))
    shape = f"{args.model} bf16, {len(messages)} prompts, up to {args.max_tokens} tokens each"
    peer = Transformers(open_checkpoint(args.model), torch.bfloat16, "cuda")
    for batch in [b for b in (1, 8, 32) if b <= len(messages)]:
        plain: tuple[list[Any], list[float]] | None = None
        for name, spec in modes(args.model).items():
            outputs, values = ours(args.model, spec, batch, messages, params, args.repeats)
            plain = plain or (outputs, values)
            if [o.token_ids for o in outputs] != [o.token_ids for o in plain[0]]:
                raise SystemExit(f"bench_gpu: {name} changed the output at batch {batch}")
            other, value = "specrt, off", median(plain[1])
            prompts = [o.prompt_token_ids for o in outputs][: max(batch, PEER_PROMPTS)]
            if name == "off":
                other, value = "transformers generate", theirs(peer, prompts, batch, args.max_tokens)
            elif name == "ngram" and batch == 1:
                other, value = "transformers prompt lookup", theirs(peer, prompts, 1, args.max_tokens, prompt_lookup_num_tokens=LOOKUP)
            rounds = sum(o.stats.num_rounds for o in outputs)
            length = (rounds + sum(o.stats.num_accepted_tokens for o in outputs)) / rounds
            results.add(f"decode_{name}_b{batch}", shape, values, "us/token", other, value, note=f"acceptance length {length:.2f}" if spec else None)
            results.write()
    print_table(results.rows)


if __name__ == "__main__":
    main()
