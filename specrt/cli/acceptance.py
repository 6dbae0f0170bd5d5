"""``specrt bench --acceptance``: what is drafted and accepted, by category and draft position, for several drafters and temperatures.

Nothing is timed, so the prompts of a category share the batch; exact verification gives every request the same tokens and drafts in any company, and two runs of the
same settings write the same file."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any, Callable

from specrt.cli import baseline, measure, options
from specrt.cli.acceptance_report import differing, tables
from specrt.cli.picture import page
from specrt.cli.prompts import Prompt

_BATCH = 8
_SHAPE = ("method", "model", *options.SPECULATION)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("acceptance")
    group.add_argument("--acceptance", action="store_true", help="measure acceptance by category and position instead of time")
    group.add_argument("--compare", metavar="FILE", help="a baseline that --json wrote with the same settings: exit code 1 where less is accepted now")
    group.add_argument("--tolerance", type=float, metavar="X", help="what a share of drafts may fall by, and the acceptance length relative to itself (default: 0.02)")
    group.add_argument("--html", metavar="FILE", help="a picture of acceptance by position and category, with all numbers")


def check(args: argparse.Namespace) -> None:
    if not args.acceptance:
        given = [name for name in ("compare", "tolerance", "html") if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} goes with --acceptance")
        return
    if args.repeats is not None:
        raise ValueError("--acceptance times nothing: --repeats has no meaning with it")
    if args.tolerance is not None and (args.compare is None or not 0 <= args.tolerance <= 1):
        raise ValueError(f"--tolerance is a number from 0 to 1 and goes with --compare, got {args.tolerance}")
    if args.compare is not None and args.json is not None and Path(args.json).resolve() == Path(args.compare).resolve():
        raise ValueError(f"--json would overwrite the baseline {args.compare}")


def label(config: Any, given: dict[str, Any]) -> str:
    """A drafter in a few words. The draft model's path counts by its last part, so that a head may move; everything else that was asked for is said.
    ``config``: the SpeculativeConfig that ``given`` parses to."""
    shape = f"tree of {config.num_draft_tokens} ({config.num_steps} x {config.eagle_topk})" if config.is_tree else f"chain of {config.num_speculative_tokens}"
    rest = [f"{key}={given[key]}" for key in given if key not in _SHAPE and given[key] is not None]
    return ", ".join([f"{config.method} {shape}", *([Path(config.model).name] if config.model else []), *rest])


def methods(args: argparse.Namespace) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Label -> (checked configuration, as given). All are checked before any model is loaded."""
    from specrt.config import SpeculativeConfig

    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for given in options.speculative_configs(args, default_method="ngram"):
        if given is None:
            raise ValueError("--method none drafts nothing to accept")
        config = SpeculativeConfig.parse(given, args.model)
        name = label(config, given)
        if name in found:
            raise ValueError(f"two of the --spec are the same: {name}")
        found[name] = config, given
    return found


def settings(args: argparse.Namespace, prompts: list[Prompt], names: list[str]) -> dict[str, Any]:
    """What two runs must have in common to be compared."""
    from specrt.config import EngineConfig

    engine = EngineConfig.parse(**options.engine(args))
    chosen = options.given_sampling(args) | {"seed": 0 if args.seed is None else args.seed, "max_tokens": 128 if args.max_tokens is None else args.max_tokens}
    temperatures = args.temperature or [0.0]
    if len(set(temperatures)) < len(temperatures):
        raise ValueError(f"--temperature has a value twice: {temperatures}")
    texts = json.dumps([[p.category, p.text] for p in prompts])
    return {"model": Path(args.model).name, "device": engine.device, "dtype": engine.dtype, "quantization": engine.quantization,
            "kv_cache_dtype": None if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype, "methods": names,  # None: as baselines have it that do not say
            "temperature": temperatures, "sampling": {key: value for key, value in chosen.items() if key != "temperature"},
            "number of prompts": len(prompts), "prompts": hashlib.sha256(texts.encode()).hexdigest()[:16]}


def by_category(prompts: list[Prompt]) -> dict[str, list[Prompt]]:
    groups = {name: [p for p in prompts if p.category == name] for name in dict.fromkeys(p.category for p in prompts)}
    if "all" in groups and len(groups) > 1:
        raise ValueError(f"the category 'all' (or none, of {groups['all'][0].id}) beside others: it is the name of their total")
    return groups


def measured(llm: Any, groups: dict[str, list[Prompt]], params: Callable[[int], Any], step: Callable[[], None]) -> list[dict[str, Any]]:
    """One row a category, and one of all. ``params``: the SamplingParams of a category's i-th prompt. ``step`` is called after every category."""
    outputs: dict[str, list[Any]] = {}
    for name, group in groups.items():
        outputs[name] = llm.generate([p.messages for p in group], [params(i) for i in range(len(group))], chat=True)
        for prompt, output in zip(group, outputs[name]):
            if output.finish_reason == "error":
                raise measure.RunFailed(f"{prompt.id} failed: {output.error}")
        step()
    if len(outputs) > 1:
        outputs["all"] = [output for group in outputs.values() for output in group]
    return [row(name, group) for name, group in outputs.items()]


def row(category: str, outputs: list[Any]) -> dict[str, Any]:
    stats = [output.stats for output in outputs]
    tokens = [list(output.token_ids) for output in outputs]
    return {"category": category, "prompts": len(outputs), "prompt_tokens": sum(s.num_prompt_tokens for s in stats), "tokens": sum(map(len, tokens)),
            "output_digest": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
            "synthetic": any(s.synthetic for s in stats), "lossy": any(s.lossy for s in stats), **measure.acceptance(stats)}


def run(args: argparse.Namespace, prompts: list[Prompt]) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from specrt import LLM

    chosen = methods(args)
    described = {name: {"speculative_config": given, "verification": config.rejection_sample_method} for name, (config, given) in chosen.items()}
    document: dict[str, Any] = {"kind": baseline.KIND, "settings": settings(args, prompts, list(chosen)), "model": str(args.model), "machine": machine(args), "methods": described}
    groups, temperatures, rows = by_category(prompts), document["settings"]["temperature"], []
    expected = {(name, t, category) for name in chosen for t in temperatures for category in [*groups, *["all"] * (len(groups) > 1)]}
    before = None if args.compare is None else baseline.load(args.compare, document["settings"], expected)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("acceptance", total=len(chosen) * len(temperatures) * len(groups))
        for name, (_, given) in chosen.items():
            with LLM(args.model, speculative_config=given, **options.engine(args, requests=min(_BATCH, max(map(len, groups.values()))))) as llm:
                for t in temperatures:
                    shared = document["settings"]["sampling"] | {"temperature": t}
                    # Numbered within the category: its figures do not depend on which others are asked.
                    params = lambda i: options.sampling(args, **{**shared, "seed": shared["seed"] + i})  # noqa: E731
                    try:
                        found = measured(llm, groups, params, lambda: progress.advance(task))
                    except measure.RunFailed as error:
                        print(f"specrt bench: {name}, T = {t:g}: {error}", file=sys.stderr)
                        return 1
                    rows += [{"method": name, "temperature": t, **r} for r in found]
    document["results"] = rows
    return report(args, document, before)


def machine(args: argparse.Namespace) -> str:
    import torch

    return platform.platform() if args.device == "cpu" or not torch.cuda.is_available() else torch.cuda.get_device_name()


def written(document: dict[str, Any]) -> str:
    """The document as JSON, a result a line: a diff of two baselines says which results changed."""
    rest = json.dumps({key: value for key, value in document.items() if key != "results"}, indent=2)
    return rest.removesuffix("\n}") + ',\n  "results": [\n    ' + ",\n    ".join(map(json.dumps, document["results"])) + "\n  ]\n}"


def report(args: argparse.Namespace, document: dict[str, Any], before: dict[str, Any] | None) -> int:
    """Prints and writes everything; the exit code."""
    from rich.console import Console

    if args.json == "-":
        print(written(document))
    else:
        Console().print(*tables(document))
        if args.json:
            Path(args.json).write_text(written(document) + "\n", encoding="utf-8")
    if args.html:
        Path(args.html).write_text(page(document), encoding="utf-8")
    failed = [f"exact methods gave different outputs: {where}" for where in differing(document)]
    if before is not None:
        tolerance = 0.02 if args.tolerance is None else args.tolerance
        found, summary = baseline.regressions(before, document, tolerance)
        failed += found
        print(f"specrt bench: {summary} (baseline {args.compare}, tolerance {tolerance:g})", file=sys.stderr)
    for line in failed:
        print(f"specrt bench: {line}", file=sys.stderr)
    return 1 if failed else 0
