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
KEYS = ("name", "shape", "value", "unit", "floor", "share_of_floor", "peer", "peer_value", "ratio", "spread", "note", "digest", "commit", "date")


# Which rooms of csrc/ a row depends on, by the beginning of its name (the longest that fits), besides the two that every kernel may use.
# A row that is not listed depends on all of csrc/: rounds, end-to-end figures, exactness.
EVERY = ("base", "ptx")
ROOMS = {"linear_": ("gemm",), "prefill_linear_": ("gemm",), "decode_attention_": ("attention",), "verify_attention_": ("attention",), "prefill_attention_": ("attention",),
         "sampling_": ("sample",), "lm_head_": ("gemm", "sample"), "greedy_": ("sample",), "append_": ("kv",), "commit_": ("kv",), "rms_norm_": ("norm",), "graph_node": (), "read_": ()}


def rooms_of(name: str) -> tuple[str, ...] | None:
    """The rooms that the row called ``name`` depends on; None: all of them."""
    fitting = [prefix for prefix in ROOMS if name.startswith(prefix)]
    return tuple(sorted({*EVERY, *ROOMS[max(fitting, key=len)]})) if fitting else None


def csrc_digest(rooms: tuple[str, ...] | None = None, cuda: bool = True) -> str:
    """sha256 over the paths and contents of every source under csrc/, or of these rooms of it, in order of their paths; 16 hex digits. Without cuda: of what the CPU's kernels are made of."""
    digest = hashlib.sha256()
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", *((".cu", ".cuh") if cuda else ())}]
    for path in sorted(p for p in sources if rooms is None or p.relative_to(ROOT / "csrc").parts[0] in rooms):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def of_cuda(file: str) -> bool:
    """Whether the rows of a results file, by its name, belong to CUDA's kernels."""
    return not Path(file).stem.endswith("cpu")


def commit() -> str:
    """The commit, with a "+" where the working tree differs from it (the results apart, which a run writes); "unknown" outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!bench/README.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        return head + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str = "cpu") -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    model = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown CPU")
    return f"{model}, {len(os.sched_getaffinity(0))} threads"


def card(name: str | None = None) -> str:
    """A GPU's short name, for file names: "h100" is the H100 SXM with 80 GB. Another card gives another name, so that its rows go to another file."""
    short = (name or machine("cuda")).removeprefix("NVIDIA ").lower().replace(" ", "_")
    return {"h100_80gb_hbm3": "h100"}.get(short, short)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


class Results:
    """Rows of one file of FOLDER, {"machine", "rows"}. ``write`` replaces the rows that were measured again (the same in all fields of ``unique``) and keeps the others: their digest
    says which kernels they belong to. Rows of another machine are dropped."""

    def __init__(self, file: str, device: str = "cpu", machine_name: str | None = None, unique: tuple[str, ...] = ("name", "shape", "peer")):
        self.path, self.machine, self.unique = FOLDER / file, machine_name or machine(device), unique
        self._cuda = of_cuda(file)
        self._common = {"commit": commit(), "date": date.today().isoformat()}
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, shape: str, values: list[float], unit: str, peer: str | None = None, peer_value: float | None = None, floor: float | None = None,
            note: str | None = None) -> dict[str, Any]:
        """``values``: one a repeat; their median is the row's."""
        value = median(values)
        return self.add_median(name, shape, value, unit, peer, peer_value, floor, (max(values) - min(values)) / value if value else 0.0, note)

    def add_median(self, name: str, shape: str, value: float, unit: str, peer: str | None, peer_value: float | None, floor: float | None, spread: float,
                   note: str | None = None) -> dict[str, Any]:
        """``ratio`` is value / peer_value; ``floor``: the least that the bytes moved allow (a time), share_of_floor = floor / value."""
        row = {"name": name, "shape": shape, "value": value, "unit": unit, "floor": floor, "share_of_floor": floor / value if floor else None, "peer": peer, "peer_value": peer_value,
               "ratio": value / peer_value if peer_value else None, "spread": spread, "note": note, "digest": csrc_digest(rooms_of(name), self._cuda), **self._common}
        self.rows.append(row)
        return row

    def write(self) -> None:
        key = lambda r: tuple(r[field] for field in self.unique)  # noqa: E731
        kept: list[dict[str, Any]] = []
        if self.path.exists():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            if before["machine"] == self.machine:
                kept = [r for r in before["rows"] if key(r) not in {key(n) for n in self.rows}]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")  # a run that is cut off leaves the old file or the new one
        draft.write_text(json.dumps({"machine": self.machine, "rows": kept + self.rows}, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD)
    for name in ("name", "shape", "value", "unit", "spread", "of floor", "peer", "peer value", "ratio"):
        grid.add_column(name, justify="left" if name in ("name", "shape", "unit", "peer") else "right", no_wrap=True)
    number = lambda x, form: "" if x is None else format(x, form)  # noqa: E731
    value = lambda x: number(x, ".3g" if x is not None and x < 10 else ".1f")  # noqa: E731
    for r in rows:
        grid.add_row(r["name"], r["shape"], value(r["value"]), r["unit"], number(r["spread"], ".1%"), number(r["share_of_floor"], ".2f"), r["peer"] or "",
                     value(r["peer_value"]), number(r["ratio"], ".2f"))
    Console(width=max(Console().width, 200)).print(grid)
