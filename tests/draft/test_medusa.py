"""MEDUSA heads: every published form, what is proposed against a float64 reading, the state after any acceptance, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from specrt import LLM, SamplingParams
from specrt.models.config import ModelConfig
from specrt.weights import open_checkpoint
from specrt.weights.inspect import describe
from specrt.weights.head_fit import fit_medusa
from specrt.weights.medusa import is_medusa, open_medusa
from tests.draft.test_head_drafter import PROMPTS, TARGET, drafted, start
from tests.invariance.matrix import make
from tests.kit.compare import assert_bits, assert_close
from tests.kit.forward import Sequence
from tests.kit.medusa import converted, medusa_tensors, reference_logits, write_medusa
from tests.kit.tiny import CONFIGS, random_tensors, tiny_tokenizer, write_folder, write_weights

pytestmark = pytest.mark.filterwarnings("ignore:head .* made for", "ignore:head .* the draft vocabulary")
CHAIN, TREE = dict(num_speculative_tokens=4), dict(num_steps=4, eagle_topk=3, num_draft_tokens=14)
MODEL = ModelConfig.from_hf(CONFIGS["llama"])
SHARED = {n: t for n, t in converted(medusa_tensors(bias=False)).items() if not n.startswith("lm_heads.")} | {"lm_head.weight": medusa_tensors()["0.1.weight"]}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("medusa") / "target", TARGET))


def whole_model(folder, tensors):
    """MEDUSA-2: the base model and its heads in one folder."""
    write_folder(folder, {**TARGET, "medusa_num_heads": 4, "medusa_num_layers": 1})
    write_weights(folder, random_tensors(ModelConfig.from_hf(TARGET)) | {"medusa_head." + n: t for n, t in tensors.items()})
    return folder


@pytest.mark.parametrize("layers, form", [(1, "trainer"), (2, "trainer"), (1, "pt"), (1, "converted"), (2, "prefixed"), (1, "whole")])
def test_every_form_is_read(tmp_path, layers, form):
    tensors = medusa_tensors(layers=layers)
    folder = {"trainer": lambda: write_medusa(tmp_path / "h", tensors), "pt": lambda: write_medusa(tmp_path / "h", tensors, "medusa_lm_head.pt"),
              "converted": lambda: write_medusa(tmp_path / "h", converted(tensors, layers), "model.safetensors", model_type="medusa", num_heads=4),
              "prefixed": lambda: write_medusa(tmp_path / "h", converted(tensors, layers, "medusa_heads."), "model.safetensors", model_type="medusa"),
              "whole": lambda: whole_model(tmp_path / "h", tensors)}[form]()
    head = open_medusa(str(folder))
    assert (head.num_heads, head.num_layers, head.hidden_size, head.draft_vocab_size, head.bias, head.shared_lm_head) == (4, layers, 128, 300, True, False)
    assert is_medusa(folder) == (form != "whole")
    for j in range(4):
        assert_bits(head.tensors.get(f"blocks.{j}.{layers - 1}.bias"), tensors[f"{j}.{layers - 1}.linear.bias"])
        assert_bits(head.tensors.get(f"lm_heads.{j}.weight"), tensors[f"{j}.{layers}.weight"])


def test_a_whole_model_is_its_own_target(tmp_path, device):
    folder = str(whole_model(tmp_path / "m", medusa_tensors()))
    assert "medusa_head.0.1.weight" in load_file(folder + "/model.safetensors") and not any("medusa" in n for n in open_checkpoint(folder).tensors.names())
    with LLM(folder, device=device, max_model_len=64, speculative_config=dict(method="medusa", model=folder, **CHAIN)) as llm:
        (out,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, ignore_eos=True))
        assert out.stats.num_draft_tokens > 0


@pytest.mark.parametrize("form", ["plain", "two blocks", "one lm_head", "token map"])
def test_what_is_proposed_is_what_the_formulas_say(tmp_path, device, target, form):
    layers = 2 if form == "two blocks" else 1
    tensors, ids, extra = medusa_tensors(layers=layers), None, {}
    stored = converted(tensors, layers)
    if form == "one lm_head":
        stored = SHARED
        tensors = medusa_tensors(bias=False) | {f"{j}.1.weight": SHARED["lm_head.weight"] for j in range(4)}
    if form == "token map":
        tensors = medusa_tensors(vocab=90)
        ids = torch.randperm(300)[:90]
        stored, extra = converted(tensors), {"token_map": ids}
    head = write_medusa(tmp_path / "h", stored | extra, "model.safetensors", model_type="medusa")
    with make(target, device=device, dtype="float32", max_model_len=128, enforce_eager=True, speculative_config=dict(method="medusa", model=str(head), **TREE)) as llm:
        round_ = llm._engine.round
        round_.lookahead = 0
        requests = start(llm, PROMPTS, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
        for _ in range(4):
            llm._engine.step()
        round_.propose(round_.shape())
        for request in requests:
            known, slot, grow = request.prompt + request.output, request.slot, round_.drafters["medusa"].expansion
            features = {4: torch.empty(len(known), 128, device=device)}
            Sequence(round_.target).prefill(known, features)
            last = features[4][-2].double().cpu()
            state = last / torch.sqrt((last * last).mean() + 1e-5) * round_.target.norm.double().cpu()
            levels = [reference_logits(tensors, j, layers, state).log_softmax(-1) for j in range(4)]
            if ids is not None:
                levels = [torch.full((300,), -1e30, dtype=torch.float64).index_copy_(0, ids, z) for z in levels]
            path: dict[int, tuple[float, int]] = {-1: (0.0, 0)}
            for c, (token, parent) in enumerate(zip(grow.cand_token[slot].tolist(), grow.cand_parent[slot].tolist())):
                score, depth = path[parent]
                path[c] = score + float(levels[depth][token]), depth + 1
                assert token in levels[depth].topk(3).indices.tolist()
            assert_close(grow.cand_score[slot], torch.tensor([path[c][0] for c in range(len(path) - 1)]), 1e-5)
            assert max(depth for _, depth in path.values()) == 4


@pytest.mark.parametrize("shape", [CHAIN, TREE, dict(choices=[[0], [1], [0, 0], [2], [1, 0], [0, 0, 5], [0, 0, 0]])], ids=["chain", "tree", "static"])
def test_after_any_round_the_state_is_that_of_a_fresh_prompt(tmp_path, device, target, shape):
    spec = dict(method="medusa", model=str(write_medusa(tmp_path / "h", medusa_tensors())), **shape)
    accepted = set()
    with make(target, device=device, max_model_len=128, speculative_config=spec) as llm, make(target, device=device, max_model_len=128, max_batch_size=1, speculative_config=spec) as fresh:
        for one in (llm, fresh):
            one._engine.round.lookahead = 0
        params = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
        requests = start(llm, PROMPTS, params)
        for _ in range(9):
            before = [len(r.output) for r in requests]
            llm._engine.step()
            accepted |= {len(r.output) - b - 1 for r, b in zip(requests, before)}
            for request in requests:
                (again,) = start(fresh, [request.prompt + request.output], params)
                fresh._engine._schedule()
                fresh._engine._prefill()
                assert_bits(llm._engine.round.drafters["medusa"].root_state[request.slot], fresh._engine.round.drafters["medusa"].root_state[again.slot])
                fresh._engine.abort(again)
    assert accepted & {1, 2, 3}


def test_drafts_do_not_depend_on_who_else_is_in_the_batch(tmp_path, device, target):
    wishes = [{"num_steps": 2}, None, {"num_steps": 3, "num_draft_tokens": 8}, {"num_steps": 1}]
    params = [SamplingParams(temperature=1.0, seed=3 + i, max_tokens=30, ignore_eos=True, speculative=wish) for i, wish in enumerate(wishes)]
    prompts = [[(5 * i + j) % 300 for j in range(12 + 7 * i)] for i in range(4)]
    facts = lambda out: (out.token_ids, out.stats.num_rounds, out.stats.num_draft_tokens_per_pos, out.stats.num_accepted_tokens_per_pos)  # noqa: E731
    spec = dict(method="medusa", model=str(write_medusa(tmp_path / "h", medusa_tensors())), **TREE)
    with make(target, device=device, max_model_len=128, max_batch_size=4, speculative_config=spec) as llm:
        assert [facts(out) for out in llm.generate(prompts, params)] == [facts(llm.generate(p, q)[0]) for p, q in zip(prompts, params)]


def test_rejection_sampling_takes_its_chains_and_trees(tmp_path, device, target):
    for shape in (CHAIN, dict(num_steps=3, eagle_topk=3, num_draft_tokens=10)):
        spec = dict(method="medusa", model=str(write_medusa(tmp_path / "h", medusa_tensors())), rejection_sample_method="standard", quantization="fp8", **shape)
        with LLM(target, device=device, dtype="float32", max_model_len=256, speculative_config=spec) as llm:
            outs = llm.generate(PROMPTS, SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True))
            assert all(o.finish_reason == "length" for o in outs) and sum(o.stats.num_accepted_tokens for o in outs) > 0


# ------------------------------------------------------------------------------------------------ refusals


def without(name):
    return lambda t: {k: v for k, v in t.items() if k != name}


@pytest.mark.parametrize("change, match", [
    (without("2.0.linear.weight"), "of 4 MEDUSA heads with 1 blocks, tensors are missing: 'blocks.2.0.weight'"), (without("1.0.linear.bias"), "missing: 'blocks.1.0.bias'"),
    (without("3.1.weight"), "missing: 'lm_heads.3.weight'"), (lambda t: {**t, "other.weight": torch.ones(2)}, "do not belong to them: 'other.weight'"),
    (lambda t: {**t, "1.1.weight": torch.ones(299, 128)}, r"'lm_heads.1.weight' has shape \[299, 128\]"), (lambda t: {**t, "0.0.linear.weight": torch.ones(128, 64)}, r"'blocks.0.0.weight' has shape"),
    (lambda t: {"a.weight": torch.ones(2)}, "holds no MEDUSA heads.*'a.weight'"), (lambda t: {**t, "0.0.linear.bias": torch.ones(128, dtype=torch.int32)}, "'blocks.0.0.bias' is I32"),
    (lambda t: {**t, "token_map": torch.zeros(300, dtype=torch.int64)}, "'token_map' must hold different token ids"), (lambda t: {**t, "token_map": torch.arange(7)}, "'token_map' has shape")])
def test_broken_heads_are_refused_by_tensor(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        open_medusa(str(write_medusa(tmp_path / "h", change(medusa_tensors()))))


@pytest.mark.parametrize("given, extra, match", [
    (dict(hidden=64), {}, "'lm_heads.0.weight' has 64 input columns; it must have the target's hidden size, 128"), (dict(vocab=299), {}, "has 299 rows; .*300 tokens, or a token_map"),
    (dict(vocab=50), {"token_map": torch.arange(50) + 260}, "'token_map' holds token id 309, the target has 300 tokens")])
def test_heads_that_do_not_fit_are_refused(tmp_path, given, extra, match):
    with pytest.raises(ValueError, match=match):
        fit_medusa(open_medusa(str(write_medusa(tmp_path / "h", medusa_tensors(**given) | extra))), MODEL, "target")


def test_drafts_deeper_than_there_are_heads(tmp_path, target):
    head = str(write_medusa(tmp_path / "h", medusa_tensors(heads=3)))
    for shape, key in ((CHAIN, "num_speculative_tokens"), (TREE, "num_steps")):
        with pytest.raises(ValueError, match=f"'{key}'. gives drafts a depth of 4; .* has 3 heads"):
            LLM(target, device="cpu", speculative_config=dict(method="medusa", model=head, **shape))
    with pytest.raises(ValueError, match="'model'.*MEDUSA heads"):
        LLM(target, device="cpu", speculative_config=dict(method="medusa"))


def test_warning_and_description(tmp_path, target):
    head = write_medusa(tmp_path / "h", medusa_tensors())
    assert fit_medusa(open_medusa(str(head)), MODEL, "/models/target") == []
    (warning,) = fit_medusa(open_medusa(str(head)), MODEL, "other")
    assert "made for 'org/target' (base_model_name_or_path), and the target is 'other'" in warning
    text = describe(head, target)
    assert "MEDUSA heads, method 'medusa'" in text and "4 heads of 1 residual blocks with bias, an lm_head each" in text and "made for org/target" in text and ": yes" in text
    assert json.loads((head / "config.json").read_text())["medusa_num_heads"] == 2, "the config is wrong, and is not believed"
    with pytest.raises(ValueError, match="layer_ids: '.*' is MEDUSA heads, which has no such setting"):
        describe(head, layer_ids=(1, 2, 3))


def test_warnings_of_the_text(tmp_path, target):
    """As other heads get them: what the draft vocabulary leaves out, another tokenizer, another chat template; when the engine starts and from inspect."""
    tokenizer, head = open_checkpoint(target).tokenizer(), tmp_path / "h"

    def warnings(tensors) -> list[str]:
        write_medusa(head, tensors, "model.safetensors", model_type="medusa")
        return fit_medusa(open_medusa(str(head)), MODEL, "t", tokenizer)

    few = converted(medusa_tensors(vocab=60)) | {"token_map": torch.arange(60)}
    (warning,) = warnings(few)
    assert "the draft vocabulary of 60 tokens covers only" in warning and warning in describe(head, target)
    with pytest.warns(UserWarning, match="head .*the draft vocabulary of 60 tokens covers only"):
        LLM(target, device="cpu", max_model_len=64, speculative_config=dict(method="medusa", model=str(head), num_speculative_tokens=2)).close()
    assert warnings(converted(medusa_tensors(vocab=280)) | {"token_map": torch.arange(280)}) == [] and warnings(converted(medusa_tensors())) == []
    tiny_tokenizer().save(str(head / "tokenizer.json"))
    assert warnings(converted(medusa_tensors())) == []
    (head / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}))
    assert warnings(converted(medusa_tensors())) == ["the head comes with another chat template than the target's"]
    other = tiny_tokenizer()
    other.add_tokens(["speculative"])
    other.save(str(head / "tokenizer.json"))
    (warning,) = warnings(converted(medusa_tensors()))
    assert "another tokenizer than the target's" in warning


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("form", ["plain", "token map"])
def test_a_tree_of_one_branch_is_a_chain(tmp_path, device, target, temperature, form):
    tensors = converted(medusa_tensors(vocab=90)) | {"token_map": torch.randperm(300)[:90]} if form == "token map" else converted(medusa_tensors())
    head, seen = str(write_medusa(tmp_path / "h", tensors, "model.safetensors", model_type="medusa")), []
    for shape in (CHAIN, dict(num_steps=4, eagle_topk=1, num_draft_tokens=5), dict(choices=[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]])):
        with make(target, device=device, max_model_len=128, enforce_eager=True, speculative_config=dict(method="medusa", model=head, **shape)) as llm:
            seen.append(drafted(llm, "medusa", temperature, lambda drafter: (drafter.root_state[:3],)))
            assert int(llm._engine.round.state.tree_size[:3].max()) == 5
    for chain, *trees in zip(*seen, strict=True):
        for tree in trees:
            assert_bits(tree, chain)
