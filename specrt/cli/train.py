"""Train a draft head for a model, on the model's own answers.

`specrt train prompts` lets a chat model make up prompts, `specrt train capture` lets it answer the prompts of a file; the other commands train a head on what it wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specrt.cli import options, outputs

_TITLES = {"eagle3": "an EAGLE-3 head", "eagle3.1": "an EAGLE-3 head with fc_norm and norm_output", "peagle": "a P-EAGLE head", "mtp": "an MTP module in MiMo's layout", "medusa": "MEDUSA heads"}
_CAPTURE = ("prompts", "output", "temperatures", "repeats", "max_tokens", "seed", "limit", "category", "without")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _prompts_arguments(commands.add_parser("prompts", help="let the model make up prompts", description=_run_prompts.__doc__))
    _capture_arguments(commands.add_parser("capture", help="answer prompts with the model and write the samples to train on", description=_run_capture.__doc__))
    for method, title in _TITLES.items():
        _method_arguments(commands.add_parser(method, help=f"train {title}", description=f"Train {title}."), method)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--max-model-len", type=int, metavar="N")
    parser.add_argument("--max-batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--kv-cache-memory", type=int, metavar="BYTES", help="for keys and values")
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def _prompts_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines with 'prompt' and 'source', for capture")
    parser.add_argument("--tries", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="default: 1")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of a prompt; longer ones are left out (default: 256)")


def _capture_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines with 'prompt', 'turns' or 'messages', and 'category' or 'source'")
    parser.add_argument("--output", required=True, metavar="FILE", help="the samples; a file that is there is gone on with")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0], metavar="X", help="taken in turn (default: 0)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="answers a prompt (default: 1)")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument("--category", action="append", metavar="NAME", help="only this category (may be given several times)")
    parser.add_argument("--without", action="append", metavar="NAME", help="not this category (may be given several times)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N prompts a category")


def _method_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    from specrt.train.settings import OBJECTIVES

    parser.add_argument("--model", default="smollm2-135m", help="the target")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="samples of `specrt train capture`")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the head, its card, log.jsonl and the state to resume from")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--init-from", metavar="HEAD", help="fine-tune this head (folder or hub name)")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--objective", choices=OBJECTIVES, help="soft cross entropy (the default), its hybrid with the acceptance rate, or with the expected accepted length of chains; "
                        "vsd: chains that the head draws, weighed by what the target accepts of them (needs --init-from, and samples captured at --temperatures 1)")
    parser.add_argument("--license", metavar="NAME", help="for the card (default: apache-2.0)")
    group = parser.add_argument_group("a new head")
    if method != "mtp":
        group.add_argument("--draft-vocab-size", type=int, metavar="N", help="the answers' most frequent tokens (default: all)")
        group.add_argument("--layers", type=int, metavar="N")
    if method != "medusa":
        group.add_argument("--intermediate-size", type=int, metavar="N", help="default: the target's")
    if method not in ("mtp", "medusa"):
        group.add_argument("--layer-ids", type=int, nargs="+", metavar="N", help="boundaries of the target to capture (default: 2, L/2, L-3)")
        for flag in ("fc-norm", "norm-before-fc", "norm-before-residual", "norm-output"):
            group.add_argument(f"--{flag}", action="store_true", default=None)
    if method == "peagle":
        group.add_argument("--mask-token-id", type=int, metavar="ID", help="a token that texts do not have")
    group = parser.add_argument_group("training")
    unroll = {"medusa": "heads to train", "peagle": "drafts of a pass to train"}.get(method, "steps of the training-time test")
    for flag, kind, text in (("unroll", int, unroll), ("decay", float, "weight of each step against the one before"), ("lr", float, None), ("warmup", float, "share of the steps"),
                             ("clip", float, "largest gradient norm"), ("weight-decay", float, None), ("epochs", int, None), ("batch-tokens", int, "padded positions a step"),
                             ("max-length", int, "tokens of a text"), ("seed", int, None)):
        group.add_argument(f"--{flag}", type=kind, metavar="X" if kind is float else "N", help=text)
    group = parser.add_argument_group("measuring")
    for flag, text in (("held-out", "prompts that are kept from training"), ("eval-every", "steps (default: an epoch)"), ("eval-tokens", "of a measured answer"),
                       ("draft-tokens", "of a measured chain"), ("patience", "measurements without a better one that end the run")):
        group.add_argument(f"--{flag}", type=int, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    return {"prompts": _run_prompts, "capture": _run_capture}.get(args.what, _run_method)(args)


def _run_prompts(args: argparse.Namespace) -> int:
    """Let a chat model make up what its users would say, at --temperature. Unfinished, empty and repeated ones are left out. The same settings make the same file."""
    import json

    from rich.console import Console
    from rich.progress import Progress

    from specrt import LLM, SamplingParams
    from specrt.train.own_prompts import own_prompts

    if args.tries < 1:
        raise ValueError(f"--tries must be at least 1, got {args.tries}")
    SamplingParams(temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens)  # refuses
    outputs.check_file(args.output, make_folders=True)
    console = Console(stderr=True)
    with LLM(args.model, **options.engine(args)) as llm, Progress(console=console) as progress:
        task = progress.add_task("prompts", total=args.tries)
        prompts = own_prompts(llm, args.tries, args.temperature, args.max_tokens, args.seed, lambda n: progress.advance(task, n))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text("".join(json.dumps({"source": "own", "prompt": text}) + "\n" for text in prompts), encoding="utf-8")
    console.print(f"{args.output}: {len(prompts)} prompts of {args.tries} tries", highlight=False)
    return 0


def _run_capture(args: argparse.Namespace) -> int:
    """Let the model answer prompts. An answer takes the place of any that the file has; of several turns, each is answered after the model's own earlier answers."""
    from rich.console import Console
    from rich.progress import Progress

    from specrt import LLM, SamplingParams
    from specrt.train.prompts import read_conversations
    from specrt.train.samples import capture

    for name in ("repeats", "max_tokens", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for temperature in args.temperatures:
        SamplingParams(temperature=temperature)  # refuses
    conversations = read_conversations(args.prompts, args.category, args.without, args.limit)
    outputs.check_file(args.output, make_folders=True)
    how: dict[str, Any] = {"model": args.model, "dtype": args.dtype, **{name: getattr(args, name) for name in _CAPTURE if name not in ("prompts", "output")}, "prompts": Path(args.prompts).name}
    console = Console(stderr=True)
    with LLM(args.model, **options.engine(args)) as llm, Progress(console=console) as progress:
        if llm.tokenizer is None:
            raise ValueError(f"model {args.model!r} has no tokenizer, which prompts need")
        task = progress.add_task("answers", total=len(conversations) * args.repeats)
        left_out = capture(llm, conversations, Path(args.output), how, lambda n: progress.advance(task, n))
    console.print(f"{args.output}: {len(conversations)} prompts x {args.repeats}" + (f", {left_out} turns left out (too long, or without an answer)" if left_out else ""), highlight=False)
    return 0


def _run_method(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, BarColumn

    from specrt.train.settings import Settings
    from specrt.train.trainer import Trainer

    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    given |= {name: tuple(given[name]) for name in ("data", "layer_ids") if name in given}
    chosen = Settings.make(given | {"method": args.what})
    outputs.check_folder(args.output)
    trainer = Trainer(chosen, args.resume)
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(args.what, total=trainer.total)

        def report(row: dict[str, Any]) -> None:
            shares = " ".join(f"{a:.2f}" for a in row["acceptance"])
            console.print(f"step {row['step']}: loss {row['loss']:.3f}, acceptance length {row['acceptance_length']:.3f} ({shares})" + (", the best so far" if row["best"] else ""), highlight=False)

        def advance(steps: int, loss: float | None) -> None:
            progress.update(task, advance=steps, **({} if loss is None else {"description": f"{args.what}, loss {loss:.3f}"}))

        best = trainer.run(report, advance)
    console.print(f"{args.output}: acceptance length {best:.3f} on held-out prompts", highlight=False)
    return 0
