"""What an acceptance run says: its heading, its tables, and whether exact methods agreed. ``document``: what --json writes."""

from __future__ import annotations

from typing import Any

_MARKS = {"exact": "", "standard": "ratio test", "synthetic": "SYNTHETIC"}


def differing(document: dict[str, Any]) -> list[str]:
    """Temperatures and categories whose text depends on the drafter although verification is exact: there must be none."""
    digests: dict[str, set[str]] = {}
    for r in document["results"]:
        if document["methods"][r["method"]]["verification"] == "exact":
            digests.setdefault(f"T = {r['temperature']:g}, {r['category']}", set()).add(r["output_digest"])
    return [where for where, values in digests.items() if len(values) > 1]


def marked(document: dict[str, Any], name: str) -> str:
    """A method's label, with a word where its drafts are not verified exactly."""
    mark = _MARKS[document["methods"][name]["verification"]] + (", lossy" if any(r["lossy"] for r in document["results"] if r["method"] == name) else "")
    return f"{name} [{mark}]" if mark else name


def heading(document: dict[str, Any]) -> str:
    s, first = document["settings"], document["methods"]
    total = sum(r["tokens"] for r in document["results"] if r["method"] == next(iter(first)) and r["category"] != "all")
    weights = f"{s['dtype']}{', ' + s['quantization'] if s['quantization'] else ''}{', FP8 keys and values' if s.get('kv_cache_dtype') else ''}"
    amount = f"{s['number of prompts']} prompts, {total} tokens a method, seed {s['sampling']['seed']}"
    return f"{document['model']}, {weights}, {s['device']} ({document['machine']}), {amount}"


def tables(document: dict[str, Any]) -> list[Any]:
    """Acceptance length and rate, category x method x temperature; then, for each method and temperature, position x category."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    at = {(r["category"], r["method"], r["temperature"]): r for r in document["results"]}
    temperatures, categories = document["settings"]["temperature"], list(dict.fromkeys(r["category"] for r in document["results"]))
    overview = Table(title="acceptance length (draft acceptance rate)", box=box.SIMPLE_HEAD)
    overview.add_column("category", no_wrap=True)
    overview.add_column("method")
    for t in temperatures:
        overview.add_column(f"T = {t:g}", justify="right", no_wrap=True)
    for category in categories:
        for name in document["methods"]:
            cells = [at[category, name, t] for t in temperatures]
            overview.add_row(category, escape(marked(document, name)), *(f"{r['acceptance_length']:.2f} ({r['draft_acceptance_rate']:.2f})" for r in cells))
    found = [escape(heading(document)), overview]
    for name in document["methods"]:
        for t in temperatures:
            grid = Table(title=f"{escape(marked(document, name))}, T = {t:g}: accepted/drafted", box=box.SIMPLE_HEAD)
            grid.add_column("position", justify="right", no_wrap=True)
            for category in categories:
                grid.add_column(category, justify="right")
            pairs = [list(zip(r["num_accepted_tokens_per_pos"], r["num_draft_tokens_per_pos"])) for r in (at[category, name, t] for category in categories)]
            for i in range(max(map(len, pairs))):
                grid.add_row(str(i + 1), *(f"{p[i][0]}/{p[i][1]}" if i < len(p) else "" for p in pairs))
            found.append(grid)
    return found
