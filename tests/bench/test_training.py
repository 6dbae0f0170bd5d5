"""The study of training: its commands are the CLI's, a stage that fails takes only those with it that need it, and its rows make its tables."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace

import pytest

from bench import training
from bench.results import KEYS, Results
from specrt.cli import build_parser
from specrt.train.settings import Settings

ARGS = Namespace(prompts="/data/train.jsonl", dev="/data/dev.jsonl", domain="math", model="smollm2-135m", head="smollm2-135m-eagle3", device="cpu", limit=2, domain_limit=3, mix_limit=1, max_tokens=8,
                 max_model_len=256, batch=4, held_out=1, epochs=1, objective_epochs=1, dev_tokens=8, dev_limit=None)


@pytest.fixture
def stages():
    return training.plan(ARGS)


def test_stages_are_commands(stages):
    for stage in stages:
        args = build_parser().parse_args(stage.command)
        if getattr(args, "objective", None):
            given = {name: getattr(args, name) for name in ("model", "objective", "init_from", "lr", "epochs", "output")}
            assert Settings.make(given | {"method": args.what, "data": tuple(args.data)}).objective == stage.name.split("_")[0]
    assert "/data" not in "".join(stage.line for stage in stages)


def test_a_stage_reads_what_those_before_it_write(stages):
    outputs = {}
    for stage in stages:
        assert {outputs.get(word, stage.name) for word in stage.command} - {stage.name} <= set(stage.needs) <= set(outputs.values())
        outputs[stage.output] = stage.name
    assert len(outputs) == len(stages)


def run(stages, folder, monkeypatch, fail=(), seconds=60, pause=0.0):
    """The stages that were executed."""
    executed = []

    async def execute(stage, work, env):
        executed.append(stage.name)
        await asyncio.sleep(pause)
        return int(stage.name in fail)

    monkeypatch.setattr(training, "execute", execute)
    asyncio.run(training.run(stages, folder, 2, seconds))
    return executed


def test_a_failure_takes_only_those_with_it_that_need_it(stages, tmp_path, monkeypatch):
    executed = run(stages, tmp_path, monkeypatch, fail=("base", "lk"))
    assert {s.name for s in stages} - set(executed) == {"tuned", "accepted_domain", "accepted_lk"}
    again = run(stages, tmp_path, monkeypatch)
    assert set(again) == {"base", "lk", "tuned", "accepted_domain", "accepted_lk"}, "what is finished is not run again"


def test_the_time_is_limited(stages, tmp_path, monkeypatch):
    assert len(run(stages, tmp_path, monkeypatch, seconds=0.1, pause=30)) == 2
    assert not any(training.finished(stage, tmp_path) for stage in stages)


def document(heads, specs, temperatures, rate):
    """What `specrt bench --acceptance --json` writes, of two categories."""
    methods = {f"{head} {i}": {"speculative_config": spec | {"model": head}} for head in heads for i, spec in enumerate(specs)}
    rows = [{"method": label, "temperature": t, "category": category, "num_rounds": 10, "acceptance_length": 1 + 4 * rate(label), "draft_acceptance_rate": rate(label), "acceptance_per_pos": [rate(label)] * 8}
            for label in methods for t in temperatures for category in ("math", "all")]
    return json.dumps({"methods": methods, "results": rows})


def test_rows_and_tables(stages, tmp_path, monkeypatch):
    run(stages, tmp_path, monkeypatch, fail=("length",))
    rate = lambda label: {"base": 0.0, "tuned": 0.5}.get(label.split()[0], 0.25)  # noqa: E731
    for stage in stages:
        if stage.name == "accepted_domain":
            (tmp_path / stage.output).write_text(document(("base", "tuned"), [training.CHAIN], training.DOMAIN_T, rate))
        elif stage.name.startswith("accepted_"):
            head = stage.name.removeprefix("accepted_").replace("shipped", ARGS.head)
            (tmp_path / stage.output).write_text(document((head,), [training.CHAIN, training.TREE], training.OBJECTIVE_T, rate))
    (tmp_path / "ce").mkdir()
    (tmp_path / "ce" / "log.jsonl").write_text('{"step": 7, "loss": 1.5, "acceptance_length": 2.5}\n')
    results = Results("unused.json", unique=("name", "shape"))
    training.add_rows(results, stages, tmp_path, 4)
    assert all(tuple(row) == KEYS for row in results.rows) and len({(row["name"], row["shape"]) for row in results.rows}) == len(results.rows)
    text = training.table({"machine": "a machine", "rows": results.rows})
    half, none = "0.50 0.50 0.50 0.50", "0.00 0.00 0.00 0.00"
    assert f"| math | 1 | 0.000 | 0.500 | 1.00 | 3.00 | {none} | {half} |" in text
    assert "| none (the head that ships) |  | " + " | ".join(["2.000"] * 6) + " |" in text
    assert "| ce, rate 0.0005 | 7, 0 | 2.000 |" in text and "| vsd, rate 5e-06 |" in text and "length, rate" not in text
    assert training.table({"machine": None, "rows": []}) == "Not measured yet.\n"
