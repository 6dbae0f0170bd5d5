"""Acceptance of one tree level, and of a short chain: children picked with the shared noise, against plain top-k and the standard ratio test.

The drafter is the target itself with its linear weights rounded to a few bits (a fair stand-in for a small model of the same family), or --draft MODEL. Each
round drafts one level of k children; its acceptance is the share of rounds in which one of them is emitted. For the chain it is accepted drafts a round. Shared noise
and plain top-k are verified exactly and emit the same text; the ratio test (multi-round without replacement for more than one child) draws its own.
Writes bench/results/acceptance_DEVICE.json."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from peer import config_json
from results import Results, print_table
from rich.progress import track
from safetensors.torch import save_file

from specrt import LLM, SamplingParams
from specrt.cli.prompts import BUILT_IN, Prompt, load_prompts
from specrt.text.gguf_vocab import tokenizer_from_metadata
from specrt.weights import Checkpoint, open_checkpoint

CHILDREN = (1, 4, 8)
CHAIN = 4
METHODS: dict[str, dict[str, str]] = {"shared noise": {}, "plain top-k": {"draft_sample_method": "greedy"}, "ratio test": {"rejection_sample_method": "standard"}}
TEMPERATURES = (1.0, 0.6)
GROUP = 64  # weights that share a scale


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric rounding to 2^bits - 1 levels, one scale for every GROUP inputs of an output."""
    groups = weight.float().reshape(-1, GROUP)
    most = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-12) / most
    return ((groups / scale).round().clamp(-most, most) * scale).reshape(weight.shape)


def write_draft(checkpoint: Checkpoint, folder: Path, bits: int) -> None:
    """The checkpoint with rounded projections, as a Hugging Face folder with the same tokenizer."""
    weights = {}
    for name in checkpoint.tensors.names():
        weight = checkpoint.tensors.get(name).float()
        weights[name] = rounded(weight, bits) if "_proj." in name else weight
    save_file({name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(checkpoint)))
    if checkpoint.folder is None:
        tokenizer_from_metadata(checkpoint.tensors.metadata, checkpoint.origin).save(str(folder / "tokenizer.json"))
    else:
        shutil.copy(checkpoint.folder / "tokenizer.json", folder)


def acceptance(llm: LLM, prompts: list[Prompt], temperature: float, max_tokens: int) -> tuple[float, int]:
    """(accepted drafts a round, rounds). For one level that is the share of rounds whose draft was accepted. A request's last round is cut by max_tokens only
    where the chain is longer than what is left, which is the same for every method."""
    params = [SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed, ignore_eos=True) for seed in range(len(prompts))]
    outputs = llm.generate([prompt.messages for prompt in prompts], params, chat=True)
    for output in outputs:
        if output.error:
            raise SystemExit(f"acceptance: {output.error}")
    return sum(o.stats.num_accepted_tokens for o in outputs) / sum(o.stats.num_rounds for o in outputs), sum(o.stats.num_rounds for o in outputs)


def shapes() -> dict[str, dict[str, int]]:
    """What is drafted: the name of a shape -> its keys in speculative_config."""
    levels = {f"{k} children": {"num_steps": 1, "eagle_topk": k, "num_draft_tokens": k + 1} for k in CHILDREN if k > 1}
    return {"1 child": {"num_speculative_tokens": 1}, **levels, f"chain of {CHAIN}": {"num_speculative_tokens": CHAIN}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--draft", help="a draft model instead of the rounded target")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--prompts", default=BUILT_IN, help="JSON lines with category and turns; the built-in ones if not given")
    parser.add_argument("--limit", type=int, help="prompts a category")
    parser.add_argument("--max-tokens", type=int, default=112)
    parser.add_argument("--output", help="file under bench/results/; acceptance_DEVICE.json if not given")
    args = parser.parse_args()
    prompts = load_prompts(args.prompts, limit=args.limit)
    results = Results(args.output or f"acceptance_{args.device}.json", args.device)
    with tempfile.TemporaryDirectory() as temporary:
        draft = args.draft
        if draft is None:
            write_draft(open_checkpoint(args.model), Path(temporary), args.bits)
            draft = temporary
        described = args.draft or f"the target with {args.bits}-bit projections"
        found: dict[tuple[str, str, float], tuple[float, int]] = {}
        for (name, keys), method in track([(s, m) for s in shapes().items() for m in METHODS], description="acceptance", transient=True):
            config = {"method": "draft_model", "model": draft, **keys, **METHODS[method]}
            with LLM(args.model, device=args.device, dtype=args.dtype, max_batch_size=len(prompts), max_model_len=2048, speculative_config=config) as llm:
                for t in TEMPERATURES:
                    found[name, method, t] = acceptance(llm, prompts, t, args.max_tokens)
        for t in TEMPERATURES:
            for name in shapes():
                shared, rounds = found[name, "shared noise", t]
                for peer in (m for m in METHODS if m != "shared noise"):
                    shape = f"{args.model}, T = {t}, {name}, draft: {described}"
                    results.add("acceptance, shared noise", shape, [shared], "accepted/round", peer, found[name, peer, t][0], note=f"{rounds} rounds")
    results.write()
    print_table(results.rows)


if __name__ == "__main__":
    main()
