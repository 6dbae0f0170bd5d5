"""The one writer of bench/results/*.json: rows that say what was measured, against what, and which kernels it belongs to."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
KEYS = ("name", "shape", "value", "unit", "peer", "peer_value", "ratio", "spread", "digest", "commit", "date", "machine")


def csrc_digest() -> str:
    """sha256 over the paths and contents of every source under csrc/, in order of their paths; 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit, with a "+" where the working tree differs from it; "unknown" outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        return head + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str = "cpu") -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    model = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown CPU")
    return f"{model}, {len(os.sched_getaffinity(0))} threads"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


class Results:
    """Collects rows; ``write`` replaces FOLDER/<file>."""

    def __init__(self, file: str, device: str = "cpu"):
        self.path = FOLDER / file
        self._common = {"digest": csrc_digest(), "commit": commit(), "date": date.today().isoformat(), "machine": machine(device)}
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, shape: str, values: list[float], unit: str, peer: str | None = None, peer_value: float | None = None) -> dict[str, Any]:
        """``values``: one a repeat. ``ratio`` is value / peer_value."""
        value = median(values)
        row = {"name": name, "shape": shape, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value,
               "ratio": value / peer_value if peer_value else None, "spread": (max(values) - min(values)) / value if value else 0.0, **self._common}
        self.rows.append(row)
        return row

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD)
    for name in ("name", "shape", "value", "unit", "spread", "peer", "peer value", "ratio"):
        grid.add_column(name, justify="left" if name in ("name", "shape", "unit", "peer") else "right", no_wrap=True)
    number = lambda x, form: "" if x is None else format(x, form)  # noqa: E731
    value = lambda x: number(x, ".3g" if x is not None and x < 10 else ".1f")  # noqa: E731
    for r in rows:
        grid.add_row(r["name"], r["shape"], value(r["value"]), r["unit"], number(r["spread"], ".1%"), r["peer"] or "",
                     value(r["peer_value"]), number(r["ratio"], ".2f"))
    Console(width=max(Console().width, 200)).print(grid)
