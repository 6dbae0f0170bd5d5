"""Prompts of every form, the target's answers to them, and the command from prompts to a head."""

from __future__ import annotations

import json

import pytest

from specrt import LLM, SamplingParams
from specrt.cli import main
from specrt.train.batches import make_batch, plan
from specrt.train.own_prompts import opening
from specrt.train.prompts import read_conversations
from specrt.train.samples import Sample, prompt_ids, read_samples
from specrt.weights.head import open_head
from tests.kit.tiny import CONFIGS, write_folder

TARGET = {**CONFIGS["llama"], "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
ROWS = [{"prompt": "Say the hat.", "source": "short"}, {"turns": ["the one", "and then?"], "category": "long", "id": "two"},
        {"messages": [{"role": "system", "content": "Be in."}, {"role": "user", "content": "Hand?"}, {"role": "assistant", "content": "of a log"}], "category": "chat"}]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("tiny") / "target", TARGET))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


def test_prompts_of_every_form(prompts):
    one, two, chat = read_conversations(prompts)
    assert (one.category, one.turns, two.id, two.turns) == ("short", ("Say the hat.",), "two", ("the one", "and then?"))
    assert chat.history == ({"role": "system", "content": "Be in."},) and chat.turns == ("Hand?",)
    assert [c.category for c in read_conversations(prompts, without=["long"])] == ["short", "chat"]
    assert [c.category for c in read_conversations(prompts, categories=["long"])] == ["long"]
    with pytest.raises(ValueError, match="has no category 'longer'; it has 'chat', 'long', 'short'"):
        read_conversations(prompts, without=["longer"])


@pytest.mark.parametrize("line, message", [("{", "not JSON"), ("[]", "an object is expected, got list"), ('{"prompt": 3}', "an object with 'prompt' .a text."), ('{"turns": []}', "an object with 'prompt' .a text."),
                                           ('{"messages": [{"role": "assistant", "content": "x"}]}', "an object with 'prompt' .a text."), ('{"messages": "x"}', "'messages' must be a list")])
def test_a_wrong_line_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=f"p.jsonl:2: {message}"):
        read_conversations(tmp_path / "p.jsonl")


def capture(target, prompts, output, *more) -> int:
    return main(["train", "capture", "--model", target, "--device", "cpu", "--dtype", "float32", "--max-model-len", "200", "--prompts", str(prompts), "--output", str(output),
                 "--temperatures", "0", "1", "--repeats", "2", "--max-tokens", "12", *more])


def test_samples_are_the_targets_own_answers(tmp_path, target, prompts, capsys):
    path = tmp_path / "samples.jsonl"
    assert capture(target, prompts, path) == 0
    header, samples = read_samples(path, 300, 200)
    assert header["model"] == target and header["temperatures"] == [0.0, 1.0] and header["prompts"] == "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len(rows) == 8 and sorted({r["id"] for r in rows}) == ["1/0", "1/1", "3/0", "3/1", "two/0", "two/1"]
    assert {(r["id"], r["temperature"]) for r in rows} == {("1/0", 0.0), ("1/1", 1.0), ("two/0", 1.0), ("two/1", 0.0), ("3/0", 0.0), ("3/1", 1.0)}
    with LLM(target, device="cpu", dtype="float32", max_model_len=200) as llm:
        first, second = [r for r in rows if r["id"] == "two/1"]
        assert second["prompt"] > first["prompt"]
        for row in (first, second):
            (again,) = llm.generate([row["ids"][: row["prompt"]]], SamplingParams(max_tokens=12))
            assert again.token_ids == row["ids"][row["prompt"] :]
        answer = llm.tokenizer.decode(first["ids"][first["prompt"] :])
        history = [{"role": "user", "content": "the one"}, {"role": "assistant", "content": answer}, {"role": "user", "content": "and then?"}]
        assert second["ids"][: second["prompt"]] == prompt_ids(llm.tokenizer, history)
    # A file that was cut short is gone on with, and comes out the same.
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(keepends=True) if '"id": "two/' not in line))
    assert capture(target, prompts, path) == 0
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    assert capture(target, prompts, path, "--seed", "1") == 2 and "was captured with seed = 0" in capsys.readouterr().err


def test_from_prompts_to_a_head(tmp_path, target, capsys):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"the {i} and {i + 1}"}) for i in range(8)))
    assert capture(target, tmp_path / "p.jsonl", tmp_path / "samples.jsonl") == 0
    common = ["--model", target, "--data", str(tmp_path / "samples.jsonl"), "--device", "cpu", "--dtype", "float32", "--held-out", "2", "--eval-tokens", "8", "--epochs", "1", "--draft-tokens", "2"]
    head = str(tmp_path / "head")
    new = ["--layer-ids", "0", "2", "4", "--draft-vocab-size", "100", "--unroll", "2", "--objective", "lk"]
    assert main(["train", "eagle3.1", *common, *new, "--output", head]) == 0
    config = open_head(head).config
    assert (config.family, config.fc_norm, config.norm_output, config.draft_vocab_size, config.layer_ids) == ("eagle3", True, True, 100, (0, 2, 4))
    assert "acceptance length" in capsys.readouterr().err
    assert main(["inspect", head, "--target", target]) == 0
    assert main(["train", "eagle3.1", *common, *new, "--output", head, "--resume"]) == 0  # there is nothing left to do
    assert main(["train", "eagle3", *common, "--output", head]) == 2
    assert main(["train", "eagle3", *common, "--output", str(tmp_path / "x"), "--init-from", head, "--layers", "2"]) == 2
    error = capsys.readouterr().err
    assert "holds a head or a run already" in error and "layers = 2 does not go with init_from" in error
    assert main(["train", "eagle3", *common, "--output", str(tmp_path / "tuned"), "--init-from", head]) == 0


def test_a_head_is_tuned_for_a_domain(tmp_path, target, capsys):
    """Some prompts of one category and a few others, sampled; a head to start from; then its own chains."""
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"the {i} and {i + 1}", "category": "ab"[i % 2]}) for i in range(24)))
    assert capture(target, tmp_path / "p.jsonl", tmp_path / "domain.jsonl", "--temperatures", "1", "--category", "a", "--limit", "6") == 0
    assert capture(target, tmp_path / "p.jsonl", tmp_path / "general.jsonl", "--temperatures", "1", "--without", "a", "--limit", "2") == 0
    common = ["--model", target, "--data", str(tmp_path / "domain.jsonl"), str(tmp_path / "general.jsonl"), "--device", "cpu", "--dtype", "float32", "--held-out", "2", "--eval-tokens", "8",
              "--epochs", "1", "--draft-tokens", "2", "--unroll", "2"]
    head, tuned = str(tmp_path / "head"), str(tmp_path / "tuned")
    assert main(["train", "eagle3", *common, "--layer-ids", "0", "2", "4", "--draft-vocab-size", "100", "--output", head]) == 0
    assert main(["train", "eagle3", *common, "--objective", "vsd", "--output", tuned]) == 2 and "give init_from" in capsys.readouterr().err
    assert main(["train", "eagle3", *common, "--objective", "vsd", "--output", tuned, "--init-from", head]) == 0
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "| objective | vsd, 2 steps" in card and f"| started from | {head} |" in card and "a (" in card and "b (" in card


def test_batches_hold_every_text_once_and_every_answer_token():
    samples = [Sample("a", list(range(5, 5 + n)), p) for n, p in ((10, 3), (80, 1), (64, 60), (200, 20), (7, 5), (65, 2))]
    for epoch in range(3):
        batches = plan(samples, 256, 0, epoch)
        assert sorted(i for b in batches for i in b) == list(range(6)) and batches == plan(samples, 256, 0, epoch)
        for members in batches:
            batch = make_batch([samples[i] for i in members])
            assert batch.ids.shape[1] % 64 == 0 and (batch.ids.numel() <= 256 or len(members) == 1)
            flat = batch.ids.flatten()
            said = [int(flat[slot + 2]) for slot in batch.slots]
            assert said == [t for i in members for t in samples[i].ids[max(samples[i].prompt, 2) :]]
            assert all(a == b + 1 or b == 1 or a == 1 for a, b in zip(batch.left, batch.left[1:]))
            ends = [int(slot + n + 1) for slot, n in zip(batch.slots, batch.left)]
            assert {e % batch.ids.shape[1] for e in ends} == {len(samples[i].ids) - 1 for i in members}
    assert plan(samples, 256, 0, 0) != plan(samples, 256, 0, 1) or plan(samples, 256, 0, 0) != plan(samples, 256, 1, 0)


def test_a_model_makes_up_prompts(tmp_path, target, capsys):
    def make(name: str, *more: str) -> list[dict]:
        command = ["train", "prompts", "--model", target, "--device", "cpu", "--dtype", "float32", "--max-model-len", "200", "--max-tokens", "150", "--tries", "12", "--output", str(tmp_path / name)]
        assert main([*command, *more]) == 0
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    rows = make("one.jsonl")
    assert rows == make("two.jsonl", "--max-batch-size", "3") and rows != make("three.jsonl", "--seed", "100") and "prompts of 12 tries" in " ".join(capsys.readouterr().err.split())
    assert len({r["prompt"] for r in rows}) == len(rows) and all(r["source"] == "own" for r in rows) and 2 <= len(rows) < 12
    assert len(read_conversations(tmp_path / "one.jsonl")) == len(rows)
    with LLM(target, device="cpu", dtype="float32", max_model_len=200) as llm:
        start = opening(llm.tokenizer)
        asked = prompt_ids(llm.tokenizer, [{"role": "user", "content": "the one"}])
        assert 0 < len(start) < len(asked) and asked[: len(start)] == start
        said = [llm.generate([start], SamplingParams(temperature=1.0, seed=i, max_tokens=150))[0] for i in range(12)]
        assert [r["prompt"] for r in rows] == list(dict.fromkeys(o.text.strip() for o in said if o.finish_reason == "stop" and len(o.text.strip()) >= 8))


def test_a_model_without_a_chat_template_makes_up_nothing():
    with pytest.raises(ValueError, match="no chat template"):
        opening(None)
