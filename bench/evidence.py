"""The GPU evidence: measures rows with the benchmark binaries, keeps the tables of the READMEs, and says what is missing, stale or too slow.

    evidence.py measure [--rows A,B] [--bin build/bin] [--cublas PATH]    rows into bench/results/<card>.json, each as soon as it is measured
    evidence.py table                                                    the tables and figures of README.md and bench/README.md, from bench/results/
    evidence.py report                                                   what `check` would complain of, and stale rows of every results file; exit status 0
    evidence.py check                                                    exit status 1 if a judged row is missing, stale, or does not reach what it must"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import contexts, readme, training  # noqa: E402
from bench.results import FOLDER, ROOT, Results, card, csrc_digest, of_cuda, rooms_of  # noqa: E402
from bench.sdpa import peer  # noqa: E402

README, BENCH_README = "README.md", "bench/README.md"
SCRIPTS = ("bench_round.py", "bench_prefill.py")  # benchmark programs in Python, beside the binaries
BEGIN, END = "<!-- evidence: made from results/h100.json by evidence.py -->\n", "<!-- end of evidence -->"


@dataclass(frozen=True)
class Limit:
    """What a row must reach. kind "share": floor / value >= a. "peer": peer_value / value >= a. "read": value <= a * floor + b. "value": value <= a. "row": value <= a times that of the
    row ``of``, of the same date and kernels."""

    kind: str
    a: float
    b: float = 0.0
    of: str = ""

    def holds(self, row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> bool:
        """rows: all of the file, by name."""
        value, floor, other = row["value"], row["floor"], row["peer_value"]
        if self.kind == "value":
            return value <= self.a
        if self.kind == "row":
            base = rows.get(self.of)
            return base is not None and all(base[key] == row[key] for key in ("digest", "date")) and value <= self.a * base["value"]
        if self.kind == "peer":
            return other is not None and other / value >= self.a
        return floor is not None and (floor / value >= self.a if self.kind == "share" else value <= self.a * floor + self.b)

    def __str__(self) -> str:
        return {"share": f"floor / value ≥ {self.a:.3g}", "peer": f"peer / value ≥ {self.a:.3g}", "read": f"≤ {self.a:.3g} floor + {self.b:.3g}", "value": f"≤ {self.a:.3g}",
                "row": f"≤ {self.a:.3g} {self.of}"}[self.kind]


def pairs(kind: str, names: str, must: tuple[float, ...], aim: tuple[float, ...]) -> dict[str, tuple[Limit, Limit]]:
    return {name: (Limit(kind, *must), Limit(kind, *aim)) for name in names.split()}


# Every judged row with what it must reach and what it aims at: one H100, cold weights, the Llama-3.1-8B shape with random weights.
JUDGED: dict[str, tuple[Limit, Limit]] = {
    **pairs("share", "linear_bf16_m1 linear_bf16_m8 linear_bf16_m32 linear_bf16_m64", (0.90,), (0.95,)),
    **pairs("share", "linear_bf16_m128", (0.85,), (0.92,)),
    **pairs("share", "linear_bf16_m256", (0.75,), (0.85,)),
    **pairs("share", "linear_fp8_m1 linear_fp8_m8 linear_fp8_m32 linear_fp8_m64", (0.82,), (0.90,)),
    **pairs("peer", "prefill_linear_bf16_m4096", (0.75,), (0.9,)),
    **pairs("read", "decode_attention_b1_1k decode_attention_b1_16k decode_attention_b32_1k", (1.3, 5), (1.1, 3)),
    **pairs("read", "verify_attention_n64_b1_1k verify_attention_n64_b1_4k verify_attention_n64_b8_1k", (1.3, 8), (1.1, 3)),
    **pairs("peer", "prefill_attention_4k", (0.6,), (0.8,)),
    **pairs("share", "decode_step_b1_1k", (1 / 1.15,), (1 / 1.08,)),
    **pairs("share", "decode_step_b8_1k", (1 / 1.17,), (1 / 1.10,)),
    **pairs("share", "decode_step_b32_1k", (1 / 1.20,), (1 / 1.12,)),
    **pairs("share", "decode_step_fp8_b1_1k", (1 / 1.25,), (1 / 1.12,)),
    **pairs("share", "verify_n64_b1_1k", (1 / 1.20,), (1 / 1.12,)),
    **pairs("value", "round_host_time_b1", (300,), (150,)),
    **pairs("value", "round_gpu_idle_b1", (20,), (5,)),
    **pairs("value", "sampling_b32_v128k", (60,), (30,)),
    **pairs("share", "llama1b_decode_step_b1", (0.78,), (0.88,)),
    **pairs("value", "eagle3_chain4_b1", (7.0,), (6.3,)),
    **pairs("value", "eagle3_chain4_b8", (7.6,), (6.8,)),
    **pairs("value", "eagle3_chain4_b32", (8.6,), (7.6,)),
    **pairs("value", "eagle3_tree60_b1", (7.2,), (6.4,)),
    "eagle3_draft_step_fp8": (Limit("row", 0.6, of="eagle3_draft_step_bf16"),) * 2,
    "mimo7b_mtp_round_b1": (Limit("row", 1.2, of="mimo7b_decode_step_b1"),) * 2,
}


# --- measuring ---


def programs(folder: Path) -> dict[tuple[str, ...], list[str]]:
    """The benchmark programs, as commands, and their rows. Each answers --list, --rows A,B and --json FILE (one JSON object a line)."""
    binaries = [(str(path),) for path in sorted(folder.glob("bench_*"))]
    if not binaries:
        raise SystemExit(f"evidence.py: no benchmark binaries in {folder}; `make bench` builds them (it needs nvcc)")
    scripts = [(sys.executable, str(ROOT / "bench" / name), "--bin", str(folder)) for name in SCRIPTS]
    return {command: subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout.split() for command in binaries + scripts}


def cublas_folder() -> str | None:
    """The cuBLAS that came with torch, if it came as a package."""
    spec = importlib.util.find_spec("nvidia")
    libraries = [lib for folder in (spec.submodule_search_locations if spec else None) or [] for lib in sorted(Path(folder).glob("*/lib/libcublas.so.*"))]
    return str(libraries[-1].parent) if libraries else None


def run(command: list[str]) -> Iterator[dict[str, Any]]:
    """The rows that ``command`` measures, each as it comes; what it prints goes to the terminal. CalledProcessError, after the last row, where it fails."""
    read, write = os.pipe()
    process = subprocess.Popen([*command, "--json", f"/dev/fd/{write}"], pass_fds=[write])
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)


def measure(rows: list[str] | None, folder: Path, cublas: str | None) -> None:
    known = programs(folder)
    unknown = set(rows or []) - {name for names in known.values() for name in names}
    if unknown:
        raise SystemExit(f"evidence.py: no program measures {', '.join(sorted(unknown))}; there are {', '.join(name for names in known.values() for name in names)}")
    cublas = cublas or cublas_folder()
    failed = []
    try:
        for program, names in known.items():
            wanted = [name for name in names if rows is None or name in rows]
            if not wanted:
                continue
            peers = {name: peer(name) for name in wanted}  # before the program starts: nothing else may run beside it
            title = next(Path(part).name for part in program if Path(part).name.startswith("bench_"))
            command = [*program, "--rows", ",".join(wanted)] + (["--cublas", cublas] if cublas and title == "bench_linear" else [])
            try:
                for row in run(command):
                    write_row(row, peers[row["name"]])
            except subprocess.CalledProcessError as error:
                failed.append(f"{title} ended with status {error.returncode}")
    finally:
        write_table()
    if failed:
        raise SystemExit(f"evidence.py: {', '.join(failed)}; the rows that passed their checks are written")


def write_row(row: dict[str, Any], other: tuple[str, float] | None) -> None:
    """Into the file of the card it was taken on. ``other``: a peer measured here, for a row that brings none."""
    results = Results(f"{card(row['machine'])}.json", machine_name=row["machine"], unique=("name",))
    named = (row["peer"], row["peer_value"]) if row["peer"] else other or (None, None)
    results.add_median(row["name"], row["shape"], row["value"], row["unit"], *named, row["floor"], row["spread"], f"read bandwidth {row['read_bandwidth'] / 1e9:.0f} GB/s")
    results.write()


# --- judging ---


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": None, "rows": []}


def stale(row: dict[str, Any], cuda: bool = True) -> bool:
    """Whether the kernels that the row depends on have changed since it was measured."""
    return row["digest"] != csrc_digest(rooms_of(row["name"]), cuda)


def complaints(content: dict[str, Any]) -> list[str]:
    """What stands between the judged rows and a passing check."""
    rows = {row["name"]: row for row in content["rows"]}
    found = []
    for name, (must, _) in JUDGED.items():
        row = rows.get(name)
        if row is None:
            found.append(f"{name}: not measured")
            continue
        if not must.holds(row, rows):
            figures = [f"{key} {row[key]:.4g}" for key in ("value", "floor", "peer_value") if row[key] is not None]
            found.append(f"{name}: must be {must}; measured {', '.join(figures)} {row['unit']}")
        if stale(row):
            found.append(f"{name}: stale, csrc/ has changed since {row['date']}")
    return found


# --- the table ---


def figure(value: float | None) -> str:
    return "" if value is None else format(value, ".3g" if value < 100 else ".0f")


def table(content: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in content["rows"]}
    lines = [f"{content['machine']}; a row in bold is judged.", "", "| row | shape | value | floor | floor / value | peer | must | aim | reached | date |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name in [*JUDGED, *(name for name in rows if name not in JUDGED)]:
        row, limits = rows.get(name), JUDGED.get(name)
        title, goals = (f"**{name}**", [str(limits[0]), str(limits[1])]) if limits else (name, ["", ""])
        if row is None:
            lines.append(f"| {title} | | not measured | | | | {' | '.join(goals)} | | |")
            continue
        reached = "" if limits is None else "aim" if limits[1].holds(row, rows) and limits[0].holds(row, rows) else "must" if limits[0].holds(row, rows) else "no"
        other = f"{row['peer']}: {figure(row['peer_value'])}" if row["peer"] else ""
        cells = [title, row["shape"], f"{figure(row['value'])} {row['unit']}", figure(row["floor"]), figure(row["share_of_floor"]), other, *goals, reached, row["date"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(file: str, text: str) -> str:
    """``text`` of README or BENCH_README with the tables of now."""
    if file == BENCH_README:
        text = readme.renewed(text, BEGIN, table(load(FOLDER / "h100.json")), END)
        for study, results in ((contexts, "contexts_h100.json"), (training, "training_h100.json")):
            text = readme.renewed(text, study.BEGIN, study.table(load(FOLDER / results)), study.END)
    return readme.with_figures(file, text)


def write_table() -> None:
    for path in (README, BENCH_README):
        (ROOT / path).write_text(with_table(path, (ROOT / path).read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("measure", "table", "report", "check"):
        commands.add_parser(name)
    options = commands.choices["measure"]
    options.add_argument("--rows", help="names, with commas between them; all by default")
    options.add_argument("--bin", type=Path, default=ROOT / "build" / "bin", help="the folder of the benchmark binaries")
    options.add_argument("--cublas", help="libcublas.so.N or its folder; the one that came with torch by default")
    a = parser.parse_args()
    if a.command == "measure":
        measure(a.rows.split(",") if a.rows else None, a.bin, a.cublas)
    elif a.command == "table":
        write_table()
    else:
        found = complaints(load(FOLDER / "h100.json"))
        print("\n".join(found) if found else "the evidence is complete")
        if a.command == "check":
            return 1 if found else 0
        for path in sorted(FOLDER.glob("*.json")):
            rows = load(path)["rows"]
            print(f"{path.name}: {sum(stale(row, of_cuda(path.name)) for row in rows)} of {len(rows)} rows are stale")
    return 0


if __name__ == "__main__":
    sys.exit(main())
