"""What training gives: a head for a domain it has not seen, and the objectives beside each other. Every stage is a command of `specrt train` or `specrt bench --acceptance`, stages
that do not need each other run side by side, and one that fails stops those alone that need it.

    python bench/training.py --prompts train_prompts.jsonl --dev prompts_dev.jsonl

* domain: a new head without the prompts of category --domain; then tuned on --domain-limit of them and --mix-limit of each other category; accepted by category and position, before and after.
* objectives: the head that ships goes on with ce, lk, length and vsd over the same texts, sampled at temperature 1, for the same steps; chains and trees, before and after.

Heads are measured once, at the end, so that all have learnt for the same steps. Finished stages are kept in --work and not run again. Writes bench/results/training_<card>.json;
`evidence.py table` puts its tables into bench/README.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.results import ROOT, Results, card  # noqa: E402

BEGIN, END = "<!-- training: made from results/training_h100.json by evidence.py -->\n", "<!-- end of training -->"
CHAIN = {"method": "eagle3", "num_speculative_tokens": 4}
TREE = {"method": "eagle3", "num_steps": 8, "eagle_topk": 10, "num_draft_tokens": 60}
SHAPES = ("chain of 4", "tree of 60")
POSITIONS = CHAIN["num_speculative_tokens"]
DOMAIN_T, OBJECTIVE_T = (0.0, 1.0), (0.0, 0.6, 1.0)
NEW_LR, TUNE_LR = 2e-3, 5e-4  # the README's
VSD_LR = (5e-6, 1e-4)  # the default, and one between it and what the other objectives learn with


@dataclass(frozen=True)
class Stage:
    """command: of specrt, run in the work folder, where it writes ``output``. needs: stages whose outputs it reads."""

    name: str
    command: tuple[str, ...]
    output: str
    needs: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """To be read: files outside the work folder by their last part."""
        return shlex.join(("specrt", *(Path(word).name if os.path.isabs(word) else word for word in self.command)))


def plan(a: argparse.Namespace) -> list[Stage]:
    """In the order in which they start, where several can."""
    model = ("--model", a.model, "--device", a.device)

    def capture(name: str, temperature: int, *which: Any) -> Stage:
        batch = ("--max-batch-size", a.batch, "--max-model-len", a.max_model_len, "--max-tokens", a.max_tokens)
        return Stage(name, words("train", "capture", *model, "--prompts", a.prompts, *which, "--temperatures", temperature, *batch, "--output", f"{name}.jsonl"), f"{name}.jsonl")

    def train(name: str, data: tuple[str, ...], epochs: int, lr: float, *how: Any, needs: tuple[str, ...] = ()) -> Stage:
        rest = ("--lr", lr, "--epochs", epochs, "--held-out", a.held_out, "--eval-every", 10**6, "--output", name)
        return Stage(name, words("train", "eagle3", *model, "--data", *(f"{d}.jsonl" for d in data), *how, *rest), name, (*data, *needs))

    def accepted(name: str, temperatures: tuple[float, ...], specs: list[dict[str, Any]], needs: tuple[str, ...]) -> Stage:
        given = [word for spec in specs for word in ("--spec", json.dumps(spec))]
        limit = () if a.dev_limit is None else ("--limit", a.dev_limit)
        measured = ("--prompts", a.dev, *limit, "--temperature", ",".join(f"{t:g}" for t in temperatures), "--max-batch-size", 16, "--max-tokens", a.dev_tokens, "--json", f"{name}.json")
        return Stage(name, words("bench", "--acceptance", *model, *given, *measured), f"{name}.json", needs)

    others, warm = ("--without", a.domain, "--limit"), ("general_1", "domain")
    found = [capture("general_1", 1, *others, a.limit), capture("general_0", 0, *others, a.limit), capture("domain", 1, "--category", a.domain, "--limit", a.domain_limit),
             capture("mix", 1, *others, a.mix_limit), train("base", ("general_0", "general_1"), a.epochs, NEW_LR, "--draft-vocab-size", 8192),
             train("tuned", ("domain", "mix"), 2, TUNE_LR, "--init-from", "base", needs=("base",))]
    heads = objectives()
    found += [train(name, warm, a.objective_epochs, lr, "--init-from", a.head, "--objective", objective) for name, (objective, lr) in heads.items()]
    found.append(accepted("accepted_domain", DOMAIN_T, [CHAIN | {"model": head} for head in ("base", "tuned")], ("base", "tuned")))
    for name in ("shipped", *heads):
        head = a.head if name == "shipped" else name
        found.append(accepted(f"accepted_{name}", OBJECTIVE_T, [shape | {"model": head} for shape in (CHAIN, TREE)], () if name == "shipped" else (name,)))
    return found


def words(*command: Any) -> tuple[str, ...]:
    return tuple(map(str, command))


def objectives() -> dict[str, tuple[str, float]]:
    """The name of a run -> its objective and rate."""
    return {name: (name, TUNE_LR) for name in ("ce", "lk", "length")} | {f"vsd_{lr:g}": ("vsd", lr) for lr in VSD_LR}


# --- running ---


async def run(stages: list[Stage], work: Path, jobs: int, seconds: float) -> None:
    """All stages, at most ``jobs`` at a time, for at most ``seconds``."""
    start, room, tasks = time.monotonic(), asyncio.Semaphore(jobs), {}
    env = {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // jobs, 1)), **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    async def one(stage: Stage) -> bool:
        if finished(stage, work) is not None:
            say(f"{stage.name}: there already")
            return True
        if not all([await tasks[name] for name in stage.needs]):
            say(f"{stage.name}: left out, as {' or '.join(stage.needs)} failed")
            return False
        async with room:
            began, status = time.monotonic(), await execute(stage, work, env)
        took = time.monotonic() - began
        if status == 0:
            done_file(stage, work).write_text(json.dumps({"command": stage.command, "seconds": took}), encoding="utf-8")
        say(f"{stage.name}: {took:.1f} s" if status == 0 else f"{stage.name}: FAILED with status {status} after {took:.1f} s, see {work / stage.name}.log")
        return status == 0

    for stage in stages:
        tasks[stage.name] = asyncio.create_task(one(stage))
    try:
        await asyncio.wait_for(asyncio.gather(*tasks.values()), seconds)
    except asyncio.TimeoutError:
        say(f"stopped: --seconds {seconds:g} are over")


async def execute(stage: Stage, work: Path, env: dict[str, str]) -> int:
    """Runs the stage from nothing; its status. Its processes do not outlive a cancelled wait."""
    output = work / stage.output
    shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    with open(work / f"{stage.name}.log", "wb") as log:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "specrt", *stage.command, cwd=work, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


def done_file(stage: Stage, work: Path) -> Path:
    return work / f"{stage.name}.done"


def finished(stage: Stage, work: Path) -> float | None:
    """The seconds that the stage took, if it has been run as it is now."""
    try:
        done = json.loads(done_file(stage, work).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return done["seconds"] if tuple(done["command"]) == stage.command else None


# --- results ---


def add_rows(results: Results, stages: list[Stage], work: Path, jobs: int) -> None:
    """Rows of all that is finished."""
    accepted: dict[tuple[str, str, float, str], dict[str, Any]] = {}
    for stage in stages:
        if (seconds := finished(stage, work)) is None:
            continue
        results.add(f"seconds {stage.name}", stage.line, [seconds], "s", note=", ".join([*learnt(work / stage.output), f"beside at most {jobs - 1} other stages"]))
        if stage.name.startswith("accepted_"):
            accepted |= read_acceptance(work / stage.output)
    categories = list(dict.fromkeys(category for *_, category in accepted))
    pairs = [("domain", "base", "tuned", product(SHAPES[:1], DOMAIN_T, categories))] + [(name, "", name, product(SHAPES, OBJECTIVE_T, ["all"])) for name in objectives()]
    for title, before, after, places in pairs:
        for where in places:
            old, new = accepted.get((before, *where)), accepted.get((after, *where))
            if old is not None and new is not None:
                add_comparison(results, title, where, old, new)


def learnt(output: Path) -> list[str]:
    """What a head's log says of its end."""
    if not (output / "log.jsonl").is_file():
        return []
    row = json.loads((output / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return [f"{row['step']} steps", f"loss {row['loss']:.3f}", f"{row['acceptance_length']:.3f} tokens a round on held-out prompts"]


def read_acceptance(path: Path) -> dict[tuple[str, str, float, str], dict[str, Any]]:
    """(head, shape, temperature, category) -> its result. The head is a stage's name, "" the one that was there before."""
    document = json.loads(path.read_text(encoding="utf-8"))
    specs = {label: method["speculative_config"] for label, method in document["methods"].items()}
    mine = {"base", "tuned", *objectives()}
    key = lambda spec: (spec["model"] if spec["model"] in mine else "", SHAPES["num_draft_tokens" in spec])  # noqa: E731
    return {(*key(specs[r["method"]]), r["temperature"], r["category"]): r for r in document["results"]}


def add_comparison(results: Results, title: str, where: tuple[str, float, str], old: dict[str, Any], new: dict[str, Any]) -> None:
    shape, t, category = where
    figures = [("acceptance length", "tokens/round", old["acceptance_length"], new["acceptance_length"])]
    if title == "domain":
        figures.append(("acceptance rate", "accepted/drafted", old["draft_acceptance_rate"], new["draft_acceptance_rate"]))
        figures += [(f"accepted at {i + 1}", "accepted/drafted", old["acceptance_per_pos"][i], new["acceptance_per_pos"][i]) for i in range(POSITIONS)]
    for name, unit, was, is_ in figures:
        results.add(f"{title} {name}", f"{category}, {shape}, T = {t:g}", [is_], unit, "before" if was else None, was or None, note=f"{new['num_rounds']} rounds, before {old['num_rounds']}")


# --- the tables ---


def table(content: dict[str, Any]) -> str:
    rows = {(row["name"], row["shape"]): row for row in content["rows"]}
    if not rows:
        return "Not measured yet.\n"
    return "\n".join([f"{content['machine']}, {max(row['date'] for row in content['rows'])}.", "", *domain_table(rows), "", *objective_table(rows)]) + "\n"


def domain_table(rows: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    lines = ["| prompts | T | drafts accepted, before | after | tokens a round, before | after | accepted by position, before | after |", "|---|---|---|---|---|---|---|---|"]
    for (name, shape), rate in rows.items():
        if name == "domain acceptance rate":
            category, _, t = shape.split(", ")
            at = [rows[f"domain accepted at {i + 1}", shape] for i in range(POSITIONS)]
            pairs = [*pair(rate, ".3f"), *pair(rows["domain acceptance length", shape], ".2f"), *(" ".join(cells) for cells in zip(*(pair(r, ".2f") for r in at)))]
            lines.append(f"| {category} | {t.removeprefix('T = ')} | {' | '.join(pairs)} |")
    return lines


def pair(row: dict[str, Any], form: str) -> tuple[str, str]:
    return format(row["peer_value"] or 0.0, form), format(row["value"], form)


def objective_table(rows: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    columns = [(shape, t) for shape in SHAPES for t in OBJECTIVE_T]
    lines = ["| " + " | ".join(["further training", "steps, seconds", *(f"{shape}, T = {t:g}" for shape, t in columns)]) + " |", "|---" * (2 + len(columns)) + "|"]
    for name in ("", *objectives()):
        found = [rows.get((f"{name or 'ce'} acceptance length", f"all, {shape}, T = {t:g}")) for shape, t in columns]
        if any(found):
            title = "none (the head that ships)" if not name else "{}, rate {:g}".format(*objectives()[name])
            cells = ["" if row is None else format(row["value"] if name else row["peer_value"], ".3f") for row in found]
            lines.append(f"| {title} | {effort(rows, name)} | {' | '.join(cells)} |")
    return lines


def effort(rows: dict[tuple[str, str], dict[str, Any]], name: str) -> str:
    row = next((row for (title, _), row in rows.items() if title == f"seconds {name}"), None)
    return "" if row is None else f"{row['note'].split(' ')[0]}, {row['value']:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="JSON lines with 'prompt' and 'source', for `specrt train capture`")
    parser.add_argument("--dev", required=True, help="prompts that no head learns from: JSON lines with 'category' and 'turns'")
    parser.add_argument("--domain", default="gsm8k_train", help="the category of --prompts that the new head does not see (default: %(default)s)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--head", default="smollm2-135m-eagle3", help="what the objectives start from (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--output", help="file under bench/results/; training_<card>.json if not given")
    for name, default, text in (("limit", 1500, "prompts of each category but --domain, each answered at the temperatures 0 and 1"), ("domain-limit", 3000, "prompts of --domain"),
                                ("mix-limit", 100, "prompts of each other category to tune with"), ("max-tokens", 256, "of an answer"), ("max-model-len", 2048, "positions of a captured text"),
                                ("batch", 128, "answers at a time"), ("held-out", 32, "prompts kept from training"), ("epochs", 3, "of the new head"), ("objective-epochs", 1, "of each objective"),
                                ("dev-tokens", 128, "of a measured answer"), ("dev-limit", None, "prompts of each category of --dev"), ("jobs", 4, "stages side by side"),
                                ("seconds", 420, "after which what runs is stopped")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text + ("" if default is None else " (default: %(default)s)"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "training", metavar="FOLDER", help="samples, heads and logs (default: build/training)")
    a = parser.parse_args()
    for name in ("prompts", "dev", "model", "head"):  # commands run in the work folder
        if Path(getattr(a, name)).exists():
            setattr(a, name, str(Path(getattr(a, name)).resolve()))
    work = a.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    stages = plan(a)
    asyncio.run(run(stages, work, a.jobs, a.seconds))
    results = Results(a.output or f"training_{card() if a.device == 'cuda' else 'cpu'}.json", a.device, unique=("name", "shape"))
    add_rows(results, stages, work, a.jobs)
    results.write()
    print(table({"machine": results.machine, "rows": results.rows}))
    missing = [stage.name for stage in stages if finished(stage, work) is None]
    if missing:
        raise SystemExit(f"training: not finished: {', '.join(missing)}")


if __name__ == "__main__":
    main()
