"""An acceptance baseline: read, checked for having the same settings, and compared with a run."""

from __future__ import annotations

import json
from typing import Any

from specrt.cli.options import read_text

KIND = "specrt acceptance 1"
Key = tuple[str, float, str]
_FIELDS = {"method", "temperature", "category", "output_digest", "acceptance_length", "draft_acceptance_rate", "accepted_per_round_per_pos"}


def load(path: str, settings: dict[str, Any], rows: set[Key]) -> dict[str, Any]:
    """The file's content. ``rows``: what the run will have.
    ValueError where it is no baseline, or one of other settings: acceptance under other settings is another quantity."""
    try:
        document = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("kind") != KIND or not isinstance(document.get("settings"), dict) or not isinstance(document.get("results"), list):
        raise ValueError(f"{path} is no acceptance baseline; write one with specrt bench --acceptance --json {path}")
    for name, value in json.loads(json.dumps(settings)).items():  # as it would be read: keys are strings
        if document["settings"].get(name) != value:
            raise ValueError(f"{path} is a baseline of other settings: its {name} is {document['settings'].get(name)!r}, this run's is {value!r}")
    if {key(r) for r in document["results"] if isinstance(r, dict) and _FIELDS <= set(r)} != rows or len(document["results"]) != len(rows):
        raise ValueError(f"{path} does not hold the whole of what its settings say; write it again")
    return document


def regressions(before: dict[str, Any], now: dict[str, Any], tolerance: float) -> tuple[list[str], str]:
    """A line for each figure that fell by more than ``tolerance``, and a summary.

    Compared are, for each method, temperature and category: the draft acceptance rate; by position, the share of rounds whose output reached it (of rounds, not of
    drafts: a rare draft at a deep position weighs as little as it matters); and the acceptance length, relative to the baseline's, for many small losses."""
    rows = {key(r): r for r in now["results"]}
    found, falls, texts = [], [], 0
    for old in before["results"]:
        new = rows[key(old)]
        texts += old["output_digest"] != new["output_digest"]
        for what, was, is_, scale in figures(old, new):
            fall = (was - is_) / scale
            falls.append(fall)
            if fall > tolerance + 1e-9:
                found.append(f"{old['method']}, T = {old['temperature']:g}, {old['category']}, {what}: {was:.3f} -> {is_:.3f}")
    summary = f"{len(found)} regressions" if found else f"no regression; the largest fall is {max(0.0, *falls):.3f}"
    return found, summary + (f"; the generated text differs from the baseline's in {texts} of {len(rows)} rows" if texts else "")


def key(row: dict[str, Any]) -> Key:
    """Method, temperature, category."""
    return row["method"], row["temperature"], row["category"]


def figures(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(name, before, now, what a fall is relative to)."""
    name, shares = "acceptance_length", "accepted_per_round_per_pos"
    found = [("acceptance length", old[name], new[name], old[name]), ("draft acceptance rate", old["draft_acceptance_rate"], new["draft_acceptance_rate"], 1.0)]
    for i, was in enumerate(old[shares]):
        found.append((f"position {i + 1}, accepted a round", was, new[shares][i] if i < len(new[shares]) else 0.0, 1.0))
    return found
