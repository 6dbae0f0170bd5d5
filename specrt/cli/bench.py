"""Measure decoding with speculation off and on, side by side.

Every prompt is answered alone, in both modes, --repeats times; rates are of the tokens after the first, medians of the repeats, +- half the spread.
Outputs of the two modes are compared, and a difference is a failure (exit code 1).

--acceptance measures no time, but what is drafted and accepted: by category and draft position, for every --spec and every --temperature. --json FILE keeps it as a
baseline, --compare FILE fails (exit code 1) where a later run accepts less."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

from specrt.cli import acceptance, measure, options, outputs
from specrt.cli.prompts import BUILT_IN, load_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", default=BUILT_IN, metavar="FILE", help="JSON lines with 'category' and 'turns' (default: six prompts of the project's own)")
    parser.add_argument("--category", action="append", metavar="NAME", help="only this category (may be given several times)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N prompts a category")
    parser.add_argument("--repeats", type=int, metavar="N", help="default: 3")
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON (- for standard output, without the table)")
    acceptance.add_arguments(parser)
    options.add_engine_arguments(parser)
    options.add_sampling_arguments(parser, several_temperatures=True)


def summarise(results: list[measure.Comparison]) -> list[dict[str, Any]]:
    """One row a category, and one of all."""
    categories = list(dict.fromkeys(r.prompt.category for r in results))
    rows = []
    for name in [*categories, "all"] if len(categories) > 1 else categories:
        part = [r for r in results if name in ("all", r.prompt.category)]
        off, on = [r.off for r in part], [r.on for r in part]
        row: dict[str, Any] = {"category": name, "prompts": len(part), "tokens": sum(len(t.token_ids) for t in on)}
        for mode, timings in (("off", off), ("on", on)):
            decode, whole = measure.rate(timings), measure.rate(timings, decode=False)
            row |= {f"{mode}_tokens_per_s": decode.value, f"{mode}_spread": decode.spread, f"{mode}_request_tokens_per_s": whole.value}
        row |= {"ratio": row["on_tokens_per_s"] / row["off_tokens_per_s"], "identical": all(r.identical for r in part), **measure.acceptance([t.stats for t in on])}
        rows.append(row)
    return rows


def tables(rows: list[dict[str, Any]], title: str) -> list[Any]:
    """Rates by category, and acceptance by position over all prompts."""
    from rich import box
    from rich.table import Table

    rates = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("category", "tokens", "off tok/s", "on tok/s", "on/off", "acc. length", "same"):
        rates.add_column(name, justify="left" if name == "category" else "right", no_wrap=True)
    for row in rows:
        pair = [f"{row[f'{mode}_tokens_per_s']:.1f} ±{50 * row[f'{mode}_spread']:.0f}%" for mode in ("off", "on")]
        rates.add_row(row["category"], str(row["tokens"]), *pair, f"{row['ratio']:.2f}", f"{row['acceptance_length']:.2f}", "yes" if row["identical"] else "NO")
    positions = Table(title="drafts by position, all prompts", box=box.SIMPLE_HEAD)
    for name in ("position", "drafted", "accepted", "acceptance"):
        positions.add_column(name, justify="right")
    total = rows[-1]
    counts = zip(total["num_draft_tokens_per_pos"], total["num_accepted_tokens_per_pos"], total["acceptance_per_pos"])
    for position, (drafted, accepted, share) in enumerate(counts, 1):
        positions.add_row(str(position), str(drafted), str(accepted), f"{share:.2f}")
    return [rates, positions]


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    for name in ("repeats", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if (args.n or 1) > 1:
        raise ValueError(f"bench measures one sample a prompt, got --n {args.n}")
    acceptance.check(args)
    for file in (args.json if args.json != "-" else None, args.html):
        if file is not None:
            outputs.check_file(file)
    prompts = load_prompts(args.prompts, args.category, args.limit)
    if args.acceptance:
        return acceptance.run(args, prompts)
    if len(args.temperature or []) > 1:
        raise ValueError(f"bench measures one temperature (several with --acceptance), got {args.temperature}")
    repeats = 3 if args.repeats is None else args.repeats
    config = options.speculative_config(args, default_method="ngram")
    if config is None:
        raise ValueError("bench compares speculation off with on: --method none leaves nothing to compare")
    # Every request draws its seed from the parameters: without one, two runs of a sampled request would differ for that reason alone.
    shared: dict[str, Any] = {"temperature": (args.temperature or [0.0])[0]}
    shared |= {"seed": 0 if args.seed is None else args.seed, "max_tokens": 128 if args.max_tokens is None else args.max_tokens}
    off, on = options.sampling(args, **shared, speculative=False), options.sampling(args, **shared)
    with options.load(args, default_method="ngram") as llm, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("bench", total=2 * repeats * len(prompts))
        try:
            results = measure.compare(llm, prompts, off, on, repeats, lambda: progress.advance(task))
        except measure.RunFailed as error:
            print(f"specrt bench: {error}", file=sys.stderr)
            return 1
    rows = summarise(results)
    document = {"model": str(args.model), "speculative_config": config, **shared, "repeats": repeats,
                "machine": platform.platform(), "results": rows,
                "differing": [r.prompt.id for r in results if not r.identical]}
    if args.json == "-":
        print(json.dumps(document, indent=2))
    else:
        Console().print(*tables(rows, f"{args.model}, {config['method']}"))
        if args.json:
            Path(args.json).write_text(json.dumps(document, indent=2), encoding="utf-8")
    if document["differing"]:
        print(f"specrt bench: speculation changed the output of {', '.join(document['differing'])}", file=sys.stderr)
        return 1
    return 0
