"""``specrt bench --acceptance`` on a tiny model: what is counted, the baseline and what it refuses, the picture."""

import copy
import json
from xml.etree import ElementTree

import pytest

from specrt import LLM, SamplingParams
from specrt.cli import baseline, main
from specrt.cli.acceptance import label
from specrt.cli.acceptance_report import differing, tables
from specrt.cli.picture import page
from specrt.cli.prompts import load_prompts
from specrt.config import SpeculativeConfig
from tests.kit.tiny import write_folder

NGRAM, DRAFT = "ngram chain of 8", "draft_model chain of 3, draft"
CATEGORIES = ["a < b & c", "chat", "all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """target, its prompts, and a draft model of the same weights."""
    folder = tmp_path_factory.mktemp("acceptance")
    write_folder(folder / "target", "llama", seed=1)
    write_folder(folder / "draft", "llama", seed=1)
    lines = [{"category": CATEGORIES[i % 2], "turns": [text]} for i, text in enumerate(["the then the thin the", "in an inn", "and the band and the", "thin thin thin"])]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def specs(folder):
    draft = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 3}
    return ["--spec", '{"method": "ngram"}', "--spec", json.dumps(draft)]


def bench(folder, *flags, spec=None):
    fixed = {"--model": str(folder / "target"), "--prompts": str(folder / "prompts.jsonl"), "--dtype": "float32", "--device": "cpu", "--max-tokens": "16",
             "--temperature": "0,1", "--max-model-len": "128"}
    for name, value in zip(flags[::2], flags[1::2]):
        fixed[name] = value
    return main(["bench", "--acceptance", *(specs(folder) if spec is None else spec), *(part for pair in fixed.items() for part in pair)])


@pytest.fixture(scope="module")
def before(folder):
    """The path of a baseline."""
    path = folder / "before.json"
    assert bench(folder, "--json", str(path), "--html", str(folder / "before.html")) == 0
    return path


@pytest.fixture
def document(before):
    return json.loads(before.read_text())


def find(document, method, temperature, category):
    return next(r for r in document["results"] if baseline.key(r) == (method, temperature, category))


def test_every_category_method_and_temperature_is_counted(document):
    assert [baseline.key(r) for r in document["results"]] == [(m, t, c) for m in (NGRAM, DRAFT) for t in (0.0, 1.0) for c in CATEGORIES]
    for r in document["results"]:
        assert sum(r["num_draft_tokens_per_pos"]) == r["num_draft_tokens"] and sum(r["num_accepted_tokens_per_pos"]) == r["num_accepted_tokens"]
        assert r["acceptance_length"] == pytest.approx(1 + sum(r["accepted_per_round_per_pos"]))
        assert not r["synthetic"] and not r["lossy"] and r["num_drafts"] <= r["num_rounds"]
    parts, total = [find(document, DRAFT, 1.0, c) for c in CATEGORIES[:2]], find(document, DRAFT, 1.0, "all")
    assert all(total[name] == sum(p[name] for p in parts) for name in ("prompts", "tokens", "prompt_tokens", "num_rounds", "num_accepted_tokens"))
    assert find(document, DRAFT, 0.0, "all")["acceptance_length"] > 3  # the draft model is the target: only the end of an answer cuts a round short


def test_counts_are_those_of_the_requests_alone(folder, document):
    prompts = [p for p in load_prompts(folder / "prompts.jsonl") if p.category == "chat"]
    with LLM(folder / "target", device="cpu", dtype="float32", max_batch_size=1, max_model_len=128, speculative_config={"method": "ngram"}) as llm:
        outputs = [llm.generate([p.messages], SamplingParams(temperature=1.0, seed=i, max_tokens=16), chat=True)[0] for i, p in enumerate(prompts)]
    row = find(document, NGRAM, 1.0, "chat")
    assert row["tokens"] == sum(len(o.token_ids) for o in outputs) and row["num_rounds"] == sum(o.stats.num_rounds for o in outputs)
    assert row["num_draft_tokens"] == sum(o.stats.num_draft_tokens for o in outputs) and row["num_accepted_tokens"] == sum(o.stats.num_accepted_tokens for o in outputs)


def test_the_document_says_what_was_run(folder, document):
    settings = document["settings"]
    assert (settings["model"], settings["dtype"], settings["device"], settings["number of prompts"], settings["temperature"]) == ("target", "float32", "cpu", 4, [0.0, 1.0])
    assert settings["sampling"] == {"max_tokens": 16, "seed": 0} and document["machine"]
    assert document["methods"][NGRAM] == {"speculative_config": {"method": "ngram"}, "verification": "exact"}


@pytest.mark.parametrize("given, name", [
    ({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 3}, "ngram chain of 4, prompt_lookup_min=3"),
    ({"method": "eagle3", "model": "/nightly/7/head", "num_steps": 8, "eagle_topk": 10, "num_draft_tokens": 60, "quantization": "fp8"}, "eagle3 tree of 60 (8 x 10), head, quantization=fp8"),
    ({"method": "eagle3", "model": "org/head", "draft_sample_method": "greedy"}, "eagle3 chain of 4, head, draft_sample_method=greedy")])
def test_a_method_is_named_by_all_that_was_asked(given, name):
    assert label(SpeculativeConfig.parse(given), given) == name


def test_the_same_run_again_is_the_same_file_and_passes(folder, before, capsys):
    again = folder / "again.json"
    assert bench(folder, "--json", str(again), "--compare", str(before), "--tolerance", "0") == 0
    assert again.read_bytes() == before.read_bytes()
    captured = capsys.readouterr()
    assert "no regression; the largest fall is 0.000" in captured.err
    assert all(name in captured.out for name in (*CATEGORIES, "T = 0", "T = 1", "accepted/drafted", "float32", "4 prompts"))


def test_every_sampling_parameter_survives_the_file(folder, tmp_path):
    flags = ["--logit-bias", '{"5": -1}', "--stop", "xyz", "--top-p", "0.9", "--temperature", "1", "--limit", "1"]
    assert bench(folder, "--json", str(tmp_path / "b.json"), *flags, spec=[]) == 0
    assert bench(folder, "--compare", str(tmp_path / "b.json"), *flags, spec=[]) == 0


def test_a_worse_drafter_is_found(folder, before, tmp_path, capsys):
    write_folder(tmp_path / "draft", "llama", seed=2)
    assert bench(folder, "--compare", str(before), "--json", str(tmp_path / "now.json"), spec=specs(tmp_path)) == 1
    lines = capsys.readouterr().err
    for figure in ("acceptance length: ", "position 1, accepted a round: ", "position 3, accepted a round: "):
        assert f"specrt bench: {DRAFT}, T = 0, a < b & c, {figure}" in lines
    assert NGRAM not in lines and "generated text differs" not in lines  # speculation is exact: a bad drafter changes no token
    assert (tmp_path / "now.json").is_file()


@pytest.mark.parametrize("fall, failing", [(0.0, False), (0.015, False), (0.02, False), (0.025, True), (-0.3, False)])
def test_the_tolerance_is_on_the_share_of_a_position(document, fall, failing):
    now = copy.deepcopy(document)
    find(now, NGRAM, 0.0, "chat")["accepted_per_round_per_pos"][1] -= fall
    found, summary = baseline.regressions(document, now, 0.02)
    assert [line.split(": ")[0] for line in found] == [f"{NGRAM}, T = 0, chat, position 2, accepted a round"] * failing
    assert summary.startswith("1 regressions" if failing else "no regression")


def test_many_small_losses_show_in_the_length(document):
    now = copy.deepcopy(document)
    row = find(now, DRAFT, 0.0, "chat")
    row["acceptance_length"] *= 0.97
    assert [line.split(": ")[0] for line in baseline.regressions(document, now, 0.02)[0]] == [f"{DRAFT}, T = 0, chat, acceptance length"]


def test_a_position_that_is_no_longer_drafted_is_a_loss(document):
    now = copy.deepcopy(document)
    find(now, DRAFT, 0.0, "chat")["accepted_per_round_per_pos"].pop()
    assert "position 3" in baseline.regressions(document, now, 0.02)[0][0]


def test_another_text_is_said(document):
    now = copy.deepcopy(document)
    find(now, DRAFT, 0.0, "chat")["output_digest"] = "0"
    found, summary = baseline.regressions(document, now, 0.02)
    assert not found and "differs from the baseline's in 1 of 12 rows" in summary
    assert differing(now) == ["T = 0, chat"] and differing(document) == []


@pytest.mark.parametrize("flags, said", [
    (["--dtype", "bfloat16"], "its dtype is 'float32', this run's is 'bfloat16'"), (["--temperature", "0"], "its temperature is [0.0, 1.0]"),
    (["--max-tokens", "8"], "its sampling is"), (["--seed", "1"], "its sampling is"), (["--limit", "1"], "its number of prompts is 4"), (["--top-k", "5"], "its sampling is"),
    (["--quantization", "fp8"], "its quantization is None"), (["--kv-cache-dtype", "fp8"], "its kv_cache_dtype is None"), (["--num-steps", "2"], "its methods is")])
def test_a_baseline_of_other_settings_is_refused(folder, before, capsys, flags, said):
    assert bench(folder, "--compare", str(before), *flags, spec=["--method", "ngram"] if "--num-steps" in flags else None) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == "" and len(captured.err.splitlines()) == 1


def test_other_prompts_are_other_settings(folder, before, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text((folder / "prompts.jsonl").read_text().replace("inn", "inns"))
    assert bench(folder, "--compare", str(before), "--prompts", str(tmp_path / "prompts.jsonl")) == 2
    assert "its prompts is" in capsys.readouterr().err


@pytest.mark.parametrize("damage, said", [
    (lambda d: "{", "is not JSON"), (lambda d: "[]", "no acceptance baseline"), (lambda d: json.dumps({"results": []}), "no acceptance baseline"),
    (lambda d: json.dumps({**d, "results": [1]}), "does not hold the whole"), (lambda d: json.dumps({**d, "results": [{**r, "category": "x"} for r in d["results"]]}), "does not hold the whole")])
def test_a_file_that_is_no_baseline_is_refused(folder, document, tmp_path, capsys, damage, said):
    (tmp_path / "b.json").write_text(damage(document))
    assert bench(folder, "--compare", str(tmp_path / "b.json")) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    (["--acceptance", "--spec", '{"method": "ngram"}', "--spec", '{"method": "ngram"}'], "the same"), (["--acceptance", "--method", "none"], "drafts nothing"),
    (["--acceptance", "--method", "magic"], "magic"), (["--acceptance", "--repeats", "2"], "--repeats"), (["--acceptance", "--tolerance", "0.1"], "--compare"),
    (["--acceptance", "--compare", "b", "--tolerance", "nan"], "0 to 1"), (["--acceptance", "--compare", "b", "--json", "b"], "overwrite"),
    (["--acceptance", "--json", "/nonexistent/b"], "no such folder"), (["--acceptance", "--html", "/nonexistent/b"], "no such folder"), (["--acceptance", "--temperature", "0,0"], "twice"), (["--acceptance", "--n", "2"], "--n"), (["--html", "f"], "--acceptance"), (["--compare", "f"], "--acceptance"),
    (["--temperature", "0,1"], "one temperature"), (["--spec", '{"method": "ngram"}', "--spec", '{"method": "ngram"}'], "2 times"),
    (["--acceptance", "--prompts", "UNNAMED"], "'all'")])
def test_flags_that_make_no_sense_are_refused(capsys, tmp_path, flags, said):
    (tmp_path / "UNNAMED").write_text('{"prompt": "a"}\n{"prompt": "b", "category": "chat"}')
    assert main(["bench", *(str(tmp_path / f) if f == "UNNAMED" else f for f in flags)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == "" and len(captured.err.splitlines()) == 1


def test_synthetic_acceptance_is_marked(folder, tmp_path, capsys):
    spec = ["--spec", '{"method": "ngram", "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2}']
    assert bench(folder, "--json", str(tmp_path / "s.json"), "--html", str(tmp_path / "s.html"), "--temperature", "0", "--category", "chat", spec=spec) == 0
    document = json.loads((tmp_path / "s.json").read_text())
    assert all(r["synthetic"] for r in document["results"]) and [r["category"] for r in document["results"]] == ["chat"]
    assert "SYNTHETIC" in capsys.readouterr().out and "SYNTHETIC" in (tmp_path / "s.html").read_text()


def test_the_picture_is_well_formed_and_holds_the_numbers(folder, before, document):
    text = (folder / "before.html").read_text()
    assert text == page(document)
    root = ElementTree.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    assert not [e for e in root.iter() if e.tag in ("script", "link", "img")] and text.count("http") == text.count('xmlns="http')
    titles = [h.text for h in root.iter("h2")]
    assert titles == [f"{m}, T = {t}" for m in (NGRAM, DRAFT) for t in (0, 1)] and len(list(root.iter(svg + "svg"))) == 4
    cells = [["".join(td.itertext()) for td in tr.iter("td")] for tr in root.iter("tr")]
    cells = [row for row in cells if row]
    for row, r in zip(cells, document["results"], strict=True):
        pairs = [f"{a}/{d}" for a, d in zip(r["num_accepted_tokens_per_pos"], r["num_draft_tokens_per_pos"])]
        assert row[0] == r["category"] and row[4] == f"{r['acceptance_length']:.3f}" and [c for c in row[7:] if c] == pairs
    circles = [t.text for t in root.iter(svg + "title")]
    assert f"chat, position 2: {find(document, DRAFT, 1.0, 'chat')['accepted_per_round_per_pos'][1]:.3f}" in circles
    assert len(circles) == sum(len(r["accepted_per_round_per_pos"]) for r in document["results"])


def test_the_tables_of_many_methods_stay_readable(document):
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(*tables(document))
    assert "…" not in capture.get() and max(map(len, capture.get().splitlines())) <= 100
