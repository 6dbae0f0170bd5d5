"""Acceptance by position and category as one HTML page that needs nothing else: a diagram in SVG for each method and temperature, and its numbers below it."""

from __future__ import annotations

from html import escape
from typing import Any

from specrt.cli.acceptance_report import heading, marked

_TITLE = "Acceptance by position and category"
_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 12, 34
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8c564b")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font-size: 11px; fill: currentColor; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6em 0 2.4em; }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #8884; font-weight: normal; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
div.wide { overflow-x: auto; }
h2 { font-size: 1.1em; margin-bottom: .3em; }
span.key { display: inline-block; width: 1.6em; border-top: 3px solid; margin-right: .5em; vertical-align: middle; }
"""


def page(document: dict[str, Any]) -> str:
    """``document``: what --json writes."""
    results = document["results"]
    categories = list(dict.fromkeys(r["category"] for r in results))
    depth = max([1, *(len(r["num_draft_tokens_per_pos"]) for r in results)])
    parts = []
    for name in document["methods"]:
        for t in document["settings"]["temperature"]:
            rows = [r for r in results if r["method"] == name and r["temperature"] == t]
            title = f"{marked(document, name)}, T = {t:g}"
            parts += [f"<h2>{escape(title)}</h2>", diagram(rows, categories, depth, title), f'<div class="wide">{numbers(rows, categories)}</div>']
    head = f'<head><meta charset="utf-8"/><title>{_TITLE}</title><style>{_STYLE}</style></head>'
    how = "Diagrams: the share of rounds in which the draft at a position was accepted (all positions add up to the acceptance length less 1). Tables: accepted/drafted tokens."
    return "\n".join(["<!DOCTYPE html>", f'<html lang="en">{head}<body>', f"<h1>{_TITLE}</h1>", f"<p>{escape(heading(document))}. {how}</p>", *parts, "</body></html>", ""])


def stroke(category: str, categories: list[str]) -> str:
    """Colours in the order of the categories, dashed where they come round again; all of them together: the colour of the text."""
    if category == "all":
        return "currentColor"
    return _COLOURS[categories.index(category) % len(_COLOURS)]


def dashes(category: str, categories: list[str]) -> str:
    again = category != "all" and categories.index(category) // len(_COLOURS)
    return f' stroke-dasharray="{2 + 3 * again} 3"' if again else ""


def diagram(rows: list[dict[str, Any]], categories: list[str], depth: int, title: str) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    x = lambda position: _LEFT + 14 + (right - _LEFT - 28) * (position - 1) / max(depth - 1, 1)  # noqa: E731
    y = lambda share: bottom - (bottom - _TOP) * share  # noqa: E731
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for quarter in range(5):
        at = y(quarter / 4)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#8886" stroke-width="{1 if quarter else 2}"/>'
                     f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{quarter / 4:g}</text>')
    for position in range(1, depth + 1, 1 + (depth - 1) // 12):
        parts.append(f'<text x="{x(position):.1f}" y="{bottom + 15}" text-anchor="middle">{position}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">draft position</text>')
    for row in rows:
        colour, name = stroke(row["category"], categories), row["category"]
        points = [(x(i), y(share), i, share) for i, share in enumerate(row["accepted_per_round_per_pos"], 1)]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{3 if name == "all" else 1.8}"{dashes(name, categories)}/>')
        for px, py, i, share in points:
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.2" fill="{colour}"><title>{escape(name)}, position {i}: {share:.3f}</title></circle>')
    return "".join([*parts, "</svg>"])


def numbers(rows: list[dict[str, Any]], categories: list[str]) -> str:
    depth = max(len(r["num_draft_tokens_per_pos"]) for r in rows)
    head = ["category", "prompts", "tokens", "rounds", "acc. length", "acc. rate", "accepted/drafted", *map(str, range(1, depth + 1))]
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for r in rows:
        pairs = list(zip(r["num_accepted_tokens_per_pos"], r["num_draft_tokens_per_pos"]))
        style = "dashed" if dashes(r["category"], categories) else "solid"
        name = f'<span class="key" style="border-color: {stroke(r["category"], categories)}; border-top-style: {style}"></span>{escape(r["category"])}'
        cells = [name, r["prompts"], r["tokens"], r["num_rounds"], f"{r['acceptance_length']:.3f}", f"{r['draft_acceptance_rate']:.3f}",
                 f"{r['num_accepted_tokens']}/{r['num_draft_tokens']}", *(f"{a}/{d}" for a, d in pairs), *[""] * (depth - len(pairs))]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"
