"""Whole runs on a tiny random target: what is learned, written, measured, resumed and refused."""

from __future__ import annotations

import itertools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from specrt import LLM, SamplingParams
from specrt.train import objectives
from specrt.train import trainer as trainer_module
from specrt.train.objectives import StepRows, loss_of, row_scores
from specrt.train.samples import Sample, read_files, read_samples, split
from specrt.train.settings import Settings
from specrt.train.trainer import Trainer
from specrt.train.vocabulary import draft_vocabulary
from specrt.weights.hf import SafetensorsSource
from tests.kit.compare import relative_error
from tests.kit.medusa import medusa_tensors, write_medusa
from tests.kit.tiny import CONFIGS, write_folder

TARGET = {**CONFIGS["llama"], "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
HOW = {"model": "tiny", "temperatures": [0.0], "repeats": 1, "max_tokens": 24, "seed": 0, "prompts": "prompts.jsonl"}
SMALL = dict(dtype="float32", device="cpu", batch_tokens=512, held_out=2, eval_tokens=12, draft_tokens=2, epochs=2, lr=3e-3, patience=9)
EAGLE3 = dict(layer_ids=(0, 2, 4), draft_vocab_size=120, unroll=3)
METHODS = {"eagle3": EAGLE3, "eagle3.1": EAGLE3, "peagle": EAGLE3 | dict(layers=2, mask_token_id=299), "mtp": dict(unroll=2), "medusa": dict(unroll=2, draft_vocab_size=150)}


pytestmark = pytest.mark.filterwarnings("ignore:head .*", "ignore:a new draft_vocab_size")  # of the few tokens of the draft vocabulary


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("tiny") / "target", TARGET))


@pytest.fixture(scope="module")
def data(target, tmp_path_factory):
    """Samples of the target's own (a random model's answers, which a head can still learn)."""
    path = tmp_path_factory.mktemp("data") / "samples.jsonl"
    lines = [HOW | {"model": target}]
    with LLM(target, device="cpu", dtype="float32", max_model_len=128) as llm:
        outputs = llm.generate([[(5 * i + j) % 200 + 3 for j in range(3 + i % 9)] for i in range(24)], SamplingParams(max_tokens=24))
    lines += [{"id": str(i), "category": f"c{i % 2}", "prompt": len(o.prompt_token_ids), "ids": o.prompt_token_ids + o.token_ids} for i, o in enumerate(outputs)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def settings(target, data, output, method="eagle3", **more) -> Settings:
    return Settings.make(dict(method=method, model=target, data=(data,), output=str(output)) | SMALL | (METHODS[method] if "init_from" not in more else {}) | more)


def weights(folder) -> dict[str, torch.Tensor]:
    source = SafetensorsSource([folder / "model.safetensors"])
    return {name: source.get(name) for name in source.names()}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_writes_a_head_that_drafts(tmp_path, target, data, method):
    trainer = Trainer(settings(target, data, tmp_path / "head", method, epochs=5, eval_every=8, lr=1e-2))
    rows = []
    first = float(trainer.train_step()["loss"])
    best = trainer.run(rows.append)
    assert len(rows) == 2 and rows[-1]["step"] == trainer.total and rows[-1]["loss"] < 0.98 * first and best == max(r["acceptance_length"] for r in rows)
    assert all(0 <= a <= 1 for r in rows for a in r["acceptance"]) and [json.loads(line) for line in (tmp_path / "head" / "log.jsonl").read_text().splitlines()] == rows
    family = trainer.settings.family
    config = {"method": family, "model": str(tmp_path / "head"), "num_speculative_tokens": 2}
    with LLM(target, device="cpu", dtype="float32", max_model_len=64, speculative_config=config) as llm:
        on, off = (llm.generate([[3, 4, 5]], SamplingParams(max_tokens=12, speculative=s))[0] for s in (None, False))
    assert on.token_ids == off.token_ids and on.stats.num_draft_tokens > 0
    card = (tmp_path / "head" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0") and f"acceptance length, 2 held-out prompts | {best:.3f}" in card and "c0 (" in card


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_stays_near(tmp_path, target, data, method):
    """What a GPU computes in bfloat16, here under the CPU's autocast: loss and gradients, in float32 weights."""
    trainer = Trainer(settings(target, data, tmp_path, method, dtype="bfloat16"))
    found = []
    for trainer.mixed in (False, True):
        batch = trainer._batch(0)
        loss = loss_of("ce", trainer.forward(batch), 0.8)
        trainer.network.zero_grad()
        loss.backward()
        found.append((float(loss.detach()), torch.cat([p.grad.flatten() for p in trainer.network.parameters()])))
    (wide, gradient), (narrow, rounded) = found
    assert rounded.dtype == torch.float32 and abs(narrow - wide) < 0.01 * wide and narrow != wide
    assert relative_error(rounded, gradient) < 0.05


def test_published_names_and_shapes(tmp_path, target, data):
    Trainer(settings(target, data, tmp_path / "e")).run(stop_after=None)
    stored = {name: tuple(t.shape) for name, t in weights(tmp_path / "e").items()}
    at = "midlayer."
    assert stored == {"fc.weight": (64, 192), f"{at}hidden_norm.weight": (64,), f"{at}input_layernorm.weight": (64,), f"{at}post_attention_layernorm.weight": (64,), "norm.weight": (64,),
                      **{f"{at}self_attn.{n}_proj.weight": (64, 128) for n in "qkv"}, f"{at}self_attn.o_proj.weight": (64, 64),
                      **{f"{at}mlp.{n}_proj.weight": (64, 64) for n in ("gate", "up", "down")}, "lm_head.weight": (120, 64), "d2t": (120,), "t2d": (300,)}
    Trainer(settings(target, data, tmp_path / "m", "mtp")).run()
    at = "model.mtp_layers.0."
    stored = {name: tuple(t.shape) for name, t in weights(tmp_path / "m").items()}
    assert stored[f"{at}input_proj.weight"] == (64, 128) and stored[f"{at}self_attn.q_proj.bias"] == (64,) and f"{at}final_layernorm.weight" in stored
    assert all(name.startswith(at) for name in stored)


def test_a_resumed_run_is_one_that_was_never_stopped(tmp_path, target, data):
    s = settings(target, data, tmp_path / "whole", eval_every=3)
    whole = Trainer(s)
    assert whole.total > 4
    whole.run()
    s = settings(target, data, tmp_path / "parts", eval_every=3)
    Trainer(s).run(stop_after=2)
    Trainer(s, resume=True).run(stop_after=2)
    parts = Trainer(s, resume=True)
    parts.run()
    assert parts.step == whole.total and parts.best == whole.best
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, parts.network.state_dict()[name]), name
    assert (tmp_path / "parts" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="lr = 0.1, but the run in .* was started with 0.003"):
        Trainer(settings(target, data, tmp_path / "parts", eval_every=3, lr=0.1), resume=True)


@pytest.mark.parametrize("method", ["eagle3", "medusa"])
def test_a_run_that_was_cut_off_between_measurements_goes_on_from_near_there(tmp_path, target, data, method, monkeypatch):
    """It stops in the middle of a step, with no measurement yet, a step after the clock had the state saved. The rest is as if it had not, to the bit, what is logged too."""
    whole = Trainer(settings(target, data, tmp_path / "whole", method, eval_every=99))
    whole.run()
    clock = itertools.count(0.0, 300.0)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # two steps take ten minutes
    s = settings(target, data, tmp_path / "cut", method, eval_every=99)
    cut, step = Trainer(s), Trainer.train_step

    def failing(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    monkeypatch.setattr(Trainer, "train_step", step)
    again = Trainer(s, resume=True)
    assert again.step == 2 and not (tmp_path / "cut" / "log.jsonl").exists()
    again.run()
    assert again.step == whole.total and again.best == whole.best
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


def test_a_vocabulary_that_leaves_much_of_the_answers_out(tmp_path, target, data):
    """A new head's, and one's that is tuned for texts it was not made for. Neither where it has nearly all."""
    few = "the draft vocabulary of 20 tokens covers [0-9.]+% of the answers' tokens"
    with pytest.warns(UserWarning, match=f"^a new draft_vocab_size: {few}, .*; a larger one would"):
        Trainer(settings(target, data, tmp_path / "few", draft_vocab_size=20)).run(stop_after=1)
    with pytest.warns(UserWarning, match=f"^a new draft_vocab_size: {few}"):
        base = Trainer(settings(target, data, tmp_path / "base", "medusa", draft_vocab_size=20, epochs=1))
    base.run()
    with pytest.warns(UserWarning, match=f"^head '.*base': {few}, .*; a new head, with these answers' tokens"):
        Trainer(settings(target, data, tmp_path / "tuned", "medusa", init_from=str(tmp_path / "base"), unroll=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*the draft vocabulary")
        Trainer(settings(target, data, tmp_path / "all", draft_vocab_size=290)).run()
        Trainer(settings(target, data, tmp_path / "module", "mtp"))
        Trainer(settings(target, data, tmp_path / "more", init_from=str(tmp_path / "all"), unroll=2))


def test_what_looks_wrong_in_a_head_to_start_from_is_said(tmp_path, target, data):
    head = write_medusa(tmp_path / "heads", medusa_tensors(hidden=64), base_model_name_or_path="org/other")
    with pytest.warns(UserWarning, match="head '.*heads': the heads were made for 'org/other'"):
        Trainer(settings(target, data, tmp_path / "tuned", "medusa", init_from=str(head), unroll=2))


def test_fine_tuning_keeps_the_heads_shape_and_vocabulary(tmp_path, target, data):
    Trainer(settings(target, data, tmp_path / "base")).run()
    tuned = Trainer(settings(target, data, tmp_path / "tuned", init_from=str(tmp_path / "base"), lr=1e-3, unroll=3))
    base, before = weights(tmp_path / "base"), float(tuned.train_step()["loss"])
    fresh = Trainer(settings(target, data, tmp_path / "fresh"))
    assert before < float(fresh.train_step()["loss"])
    tuned.run()
    after = weights(tmp_path / "tuned")
    assert after.keys() == base.keys() and torch.equal(after["d2t"], base["d2t"]) and not torch.equal(after["fc.weight"], base["fc.weight"])
    assert (tmp_path / "tuned" / "config.json").read_text() == (tmp_path / "base" / "config.json").read_text()
    with pytest.raises(ValueError, match="is a head of method 'eagle3', and the method is 'mtp'"):
        Trainer(settings(target, data, tmp_path / "other", "mtp", init_from=str(tmp_path / "base")))


@pytest.mark.parametrize("objective", ["lk", "length"])
def test_the_acceptance_objectives_raise_acceptance(tmp_path, target, data, objective):
    trainer = Trainer(settings(target, data, tmp_path, objective=objective, epochs=12))
    first = trainer.train_step()["alpha"].mean()
    for _ in range(trainer.total - 1):
        last = trainer.train_step()["alpha"].mean()
    assert last > 1.08 * first


def test_objectives_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    ce, alpha, hit = row_scores(q.log(), p.log())
    assert float(ce) == pytest.approx(-(0.5 * torch.tensor(0.25).log() + 0.25 * torch.tensor(0.5).log() + 0.25 * torch.tensor(0.25).log())) and float(alpha) == pytest.approx(0.75) and not hit
    one, half = torch.ones(2), torch.tensor([1.0, 0.0])
    steps = [StepRows(ce=torch.tensor([1.0, 3.0]), alpha=torch.tensor([0.8, 0.4]), hit=one, counted=one, taught=half),
             StepRows(ce=torch.tensor([2.0, 9.0]), alpha=torch.tensor([0.5, 0.0]), hit=one, counted=half, taught=half)]
    assert float(loss_of("ce", steps, 0.8)) == pytest.approx(1.0 + 0.8 * 2.0)
    w0, w1 = torch.exp(torch.tensor(-3 * 0.6)), torch.exp(torch.tensor(-3 * 0.5))
    assert float(loss_of("lk", steps, 0.8)) == pytest.approx(float(w0 * 1 + (1 - w0) * 0.4 + 0.8 * (w1 * 2 + (1 - w1) * 0.5)))
    chain = 1 - ((0.8 + 0.8 * 0.5) + 0.4) / 2 / 2
    assert float(loss_of("length", steps, 0.8)) == pytest.approx(float(w0 * 1 + 0.8 * w1 * 2 + (1 - w0) * 2 * chain))


def test_the_fused_scores_are_compiled_when_first_used_and_once(monkeypatch):
    """Under autograd, made again in the backward pass as the trainer has it, and for any number of rows."""
    compiled, graphs, whole = [], [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(f) or whole(f, backend=count, **how))
    objectives._fused_scores.cache_clear()
    try:
        for rows in (5, 7, 12):
            logits, teacher = torch.randn(rows, 30), torch.log_softmax(torch.randn(rows, 30), -1)
            found = []
            for fused in (False, True):
                x = logits.clone().requires_grad_()
                scores = objectives._fused_scores() if fused else objectives._scores
                ce, alpha, hit = checkpoint(scores, x, teacher, use_reentrant=False)
                (ce.sum() - alpha.sum()).backward()
                found.append((ce, alpha, hit, x.grad))
            assert all(torch.equal(a, b) for a, b in zip(*found))
        assert compiled == [objectives._scores] and len(graphs) == 1
    finally:
        objectives._fused_scores.cache_clear()


def test_the_vocabulary_is_what_answers_are_made_of():
    samples = [Sample("a", [9, 9, 9, 4, 4, 7], 3), Sample("a", [9, 5, 7, 7], 1)]
    ids, covered = draft_vocabulary(samples, 2, 20)
    assert ids.tolist() == [4, 7] and covered == pytest.approx(5 / 6)
    assert draft_vocabulary(samples, 4, 20)[0].tolist() == [0, 4, 5, 7]  # of unused ones the lowest


def test_held_out_prompts_are_kept_with_all_their_answers():
    samples = [Sample("a", [p, p, 1, r], 2) for p in range(10) for r in range(3)]
    train, held = split(samples, 3)
    assert len(held) == 3 and len(train) == 21 and not {tuple(s.prompt_ids) for s in held} & {tuple(s.prompt_ids) for s in train}
    assert [s.ids for s in split(samples[::-1], 3)[1]] != [] and {tuple(s.prompt_ids) for s in split(samples[::-1], 3)[1]} == {tuple(s.prompt_ids) for s in held}
    with pytest.raises(ValueError, match="held_out = 10 leaves nothing of 10 prompts"):
        split(samples, 10)


WRONG = [(dict(method="eagle2"), "method = 'eagle2'"), (dict(objective="mse"), "objective = 'mse'"), (dict(unroll=0), "unroll = 0"), (dict(lr=-1.0), "lr = -1.0"), (dict(epochs=0), "epochs = 0"),
         (dict(method="peagle", mask_token_id=None), "mask_token_id = None"), (dict(method="mtp", fc_norm=True), "fc_norm is of EAGLE-3"), (dict(fc_norm=True, norm_before_fc=True), "exclude each other"),
         (dict(init_from="x", layers=2), "layers = 2 does not go with init_from"), (dict(method="mtp", draft_vocab_size=100), "one layer and the target's vocabulary"),
         (dict(mask_token_id=3), "mask_token_id is of P-EAGLE"), (dict(method="medusa", unroll=2, draft_tokens=4), "draft_tokens = 4 is more than the 2")]


@pytest.mark.parametrize("given, message", WRONG, ids=[m for _, m in WRONG])
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.make(dict(method="eagle3", model="m", data=("d",), output="o") | given)


def test_what_does_not_fit_is_refused(tmp_path, target, data):
    with pytest.raises(ValueError, match="must ascend"):
        Trainer(settings(target, data, tmp_path / "a", layer_ids=(2, 2, 4)))
    with pytest.raises(ValueError, match="draft_vocab_size = 400 is more than the target's 300"):
        Trainer(settings(target, data, tmp_path / "b", draft_vocab_size=400))
    with pytest.raises(ValueError, match="no run to resume"):
        Trainer(settings(target, data, tmp_path / "c"), resume=True)
    with pytest.raises(ValueError, match="is not a file of `specrt train capture`"):
        read_samples(target + "/config.json", 300, 64)
    (tmp_path / "other.jsonl").write_text(json.dumps(HOW) + "\n" + json.dumps({"id": "0", "category": "a", "prompt": 1, "ids": [1, 2, 3, 999]}))
    with pytest.raises(ValueError, match="holds token 999, and the model has 300"):
        read_samples(tmp_path / "other.jsonl", 300, 64)
    headers, samples = read_files((data, data), 300, 64)
    assert [h["model"] for h in headers] == [target] * 2 and len(samples) == 2 * len(read_samples(data, 300, 64)[1])
    (tmp_path / "other.jsonl").write_text(json.dumps(HOW) + "\n" + json.dumps({"id": "0", "category": "a", "prompt": 1, "ids": [1, 2, 3]}))
    with pytest.raises(ValueError, match="of different models: .*, 'tiny'"):
        read_files((data, str(tmp_path / "other.jsonl")), 300, 64)
    Trainer(settings(target, data, tmp_path / "d")).run(stop_after=1)
    with pytest.raises(ValueError, match="holds a head or a run already"):
        Trainer(settings(target, data, tmp_path / "d"))
