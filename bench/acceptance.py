"""Acceptance of one tree level under exact verification: the drafter's children picked with the shared noise, against its plain top-k.

The drafter is the target itself with its linear weights rounded to a few bits (a fair stand-in for a small model of the same family), or --draft MODEL. Each
round drafts one level of k children; its acceptance is the share of rounds in which the target's token is among them. Writes bench/results/acceptance.json."""

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


def level_acceptance(llm: LLM, prompts: list[Prompt], temperature: float, max_tokens: int) -> tuple[float, int]:
    """(share of rounds whose draft was accepted, rounds)."""
    accepted = rounds = 0
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed, ignore_eos=True)
        (output,) = llm.generate([prompt.messages], params, chat=True)
        if output.error:
            raise SystemExit(f"acceptance: {output.error}")
        accepted += sum(output.stats.num_accepted_tokens_per_pos)
        rounds += output.stats.num_rounds
    return accepted / rounds, rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--draft", help="a draft model instead of the rounded target")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--prompts", default=BUILT_IN)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-tokens", type=int, default=96)
    args = parser.parse_args()
    prompts = load_prompts(args.prompts, limit=args.limit)
    results = Results("acceptance.json", args.device)
    with tempfile.TemporaryDirectory() as temporary:
        draft = args.draft
        if draft is None:
            write_draft(open_checkpoint(args.model), Path(temporary), args.bits)
            draft = temporary
        described = args.draft or f"the target with {args.bits}-bit projections"
        share: dict[tuple[str, int, float], float] = {}
        for method, children in track([(m, k) for k in CHILDREN for m in ("top-k", "shared noise")], description="acceptance", transient=True):
            config = {"method": "draft_model", "model": draft}
            config |= {"num_speculative_tokens": 1} if children == 1 else {"num_steps": 1, "eagle_topk": children, "num_draft_tokens": children + 1}
            if method == "top-k":
                config["draft_sample_method"] = "greedy"
            with LLM(args.model, device=args.device, dtype=args.dtype, max_batch_size=1, speculative_config=config) as llm:
                for t in TEMPERATURES:
                    share[method, children, t], rounds = level_acceptance(llm, prompts, t, args.max_tokens)
                    if method == "shared noise":
                        shape = f"{args.model}, T = {t}, {children} children, {rounds} rounds, draft: {described}"
                        results.add("level acceptance, shared noise", shape, [share[method, children, t]], "accepted/round", "plain top-k", share["top-k", children, t])
    results.write()
    print_table(results.rows)


if __name__ == "__main__":
    main()
