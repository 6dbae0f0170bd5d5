"""Heads that come with the package: which one a target gets, and that those in the repository are what they should be. The first tests need none: they bring a folder of their own."""

from __future__ import annotations

import re

import pytest

from specrt import LLM, SamplingParams, heads
from specrt.cli import main
from specrt.config import EngineConfig, SpeculativeConfig
from specrt.weights.checkpoint import locate_folder, open_checkpoint
from specrt.weights.head import open_head
from specrt.weights.head_fit import fit
from tests.kit.heads import Shape, random_head
from tests.kit.medusa import medusa_tensors, write_medusa
from tests.kit.tiny import CONFIGS, write_folder

TARGET = "smollm2-135m"
SIZE = dict(vocab=49152, hidden=576, target_hidden=576, intermediate=256, heads=9, kv_heads=3)
MOST_BYTES = 30e6
PROMPTS = ["The capital of France is", "one two three one two three one two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two heads of random weights for the default model."""
    folder = tmp_path_factory.mktemp("heads")
    random_head(folder / f"{TARGET}-eagle3", Shape(draft=512, **SIZE))
    random_head(folder / f"{TARGET}-mtp", Shape("mtp", bias=True, draft=None, **SIZE))
    (folder / "__pycache__").mkdir()
    return folder


@pytest.fixture
def shipped(folder, monkeypatch):
    monkeypatch.setattr(heads, "FOLDER", folder)
    return folder


def test_a_target_finds_its_head(shipped, tmp_path, monkeypatch):
    assert heads.shipped() == {name: shipped / name for name in (f"{TARGET}-eagle3", f"{TARGET}-mtp")}
    assert heads.shipped_for(TARGET, "eagle3") == f"{TARGET}-eagle3" and heads.shipped_for(TARGET, "mtp") == f"{TARGET}-mtp"
    assert heads.shipped_for(TARGET, "eagle") is None and heads.shipped_for("smollm2-360m", "eagle3") is None and heads.shipped_for("", "eagle3") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / TARGET).mkdir()
    assert heads.shipped_for(TARGET, "eagle3") is None, "a folder of that name is what the user means, and it may hold any model"


def test_the_configuration_names_the_head(shipped):
    config = SpeculativeConfig.parse({"method": "eagle3"}, TARGET)
    assert (config.model, config.num_speculative_tokens) == (f"{TARGET}-eagle3", 4)
    assert SpeculativeConfig.parse({"method": "eagle3", "num_draft_tokens": 16}, TARGET).num_draft_tokens == 16
    config = EngineConfig.parse(device="cpu", speculative_config={"method": "mtp"}, target=TARGET).speculative
    assert (config.model, config.num_speculative_tokens) == (f"{TARGET}-mtp", 3)
    assert SpeculativeConfig.parse({"method": "eagle3", "model": "mine"}, TARGET).model == "mine"
    assert SpeculativeConfig.parse({"method": "ngram"}, TARGET).model is None and SpeculativeConfig.parse({"method": "mtp"}, "org/other").model is None


def test_a_head_in_a_models_place_says_how_to_use_it(shipped, tmp_path):
    medusa = str(write_medusa(tmp_path / "heads", medusa_tensors()))
    for method, name in (("eagle3", f"{TARGET}-eagle3"), ("mtp", f"{TARGET}-mtp"), ("eagle3", str(shipped / f"{TARGET}-eagle3")), ("medusa", medusa)):
        use = f"model {name!r} is a draft head and no language model: with its target as the model it is used by speculative_config = {{'method': {method!r}, 'model': {name!r}}} (--method"
        with pytest.raises(ValueError, match=re.escape(use)):
            open_checkpoint(name)
        with pytest.raises(ValueError, match=re.escape(use)):
            LLM(TARGET, device="cpu", max_model_len=64, speculative_config={"method": "draft_model", "model": name})


def test_a_broken_head_in_a_models_place_is_a_broken_model(tmp_path):
    folder = random_head(tmp_path / "head", Shape())
    (folder / "model.safetensors").write_bytes(b"0" * 99)
    with pytest.raises(ValueError, match="not a readable safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("method, target", [("eagle3", "org/other"), ("eagle", TARGET), ("medusa", TARGET)])
def test_without_one_the_error_says_what_ships(shipped, monkeypatch, method, target):
    with pytest.raises(ValueError, match=rf"'model'. is missing; method '{method}' needs .*; with the package comes '{TARGET}-eagle3', '{TARGET}-mtp'$"):
        LLM(target, device="cpu", speculative_config={"method": method})
    monkeypatch.setattr(heads, "FOLDER", shipped / "none")
    with pytest.raises(ValueError, match="or a hub name$"):
        SpeculativeConfig.parse({"method": method}, target)


def test_another_target_without_a_module(shipped, tmp_path):
    with pytest.raises(ValueError, match=f"and the target holds no MTP module: .*; with the package comes '{TARGET}-eagle3'"):
        LLM(write_folder(tmp_path, CONFIGS["llama"]), device="cpu", speculative_config={"method": "mtp"})
    with pytest.raises(ValueError, match=f"{TARGET}-eagle3': vocab_size = 49152, the target has 300 tokens|input columns"):
        LLM(tmp_path, device="cpu", speculative_config={"method": "eagle3", "model": f"{TARGET}-eagle3"})


def test_names_are_places(shipped, tmp_path, monkeypatch):
    assert locate_folder(f"{TARGET}-mtp") == shipped / f"{TARGET}-mtp"
    with pytest.raises(ValueError, match=f"head '{TARGET}-eagle9' is no folder here; .*; with the package comes '{TARGET}-eagle3'"):
        locate_folder(f"{TARGET}-eagle9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{TARGET}-mtp").mkdir()
    assert locate_folder(f"{TARGET}-mtp").resolve() == tmp_path / f"{TARGET}-mtp"


def generated(spec: dict | None) -> tuple[list, list]:
    """What is said, tokens and log-probabilities; and the drafts of each answer."""
    with LLM(TARGET, device="cpu", max_batch_size=2, max_model_len=128, speculative_config=spec) as llm:
        outs = llm.generate(PROMPTS, SamplingParams(temperature=0.8, seed=3, max_tokens=16, ignore_eos=True, logprobs=1))
    return [(out.token_ids, out.logprobs) for out in outs], [out.stats.num_draft_tokens for out in outs]


@pytest.fixture(scope="module")
def plain():
    return generated(None)[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spec", [{"method": "eagle3"}, {"method": "eagle3", "num_draft_tokens": 8}, {"method": "mtp"}], ids=["eagle3", "eagle3-tree", "mtp"])
def test_the_head_drafts_and_changes_nothing(shipped, plain, spec):
    said, drafts = generated(spec)
    assert said == plain and all(drafts)


def test_the_shell_takes_it_too(shipped, capsys):
    assert main(["generate", "--device", "cpu", "--method", "eagle3", "--max-tokens", "4", "--max-model-len", "64", "--json", "Hello"]) == 0
    assert '"num_draft_tokens": 0' not in capsys.readouterr().out
    assert main(["inspect", f"{TARGET}-mtp", "--target", TARGET]) == 0
    assert "MTP module" in (text := capsys.readouterr().out) and f"{TARGET}: yes" in text
    assert main(["inspect", TARGET]) == 0
    assert f"{TARGET}-eagle3, {TARGET}-mtp, which come with the package" in capsys.readouterr().out
    assert main(["generate", "--device", "cpu", "--method", "eagle", "Hello"]) == 2
    assert f"with the package comes '{TARGET}-eagle3'" in capsys.readouterr().err


# --- what the repository holds ---


def test_heads_that_ship_are_complete_and_fit_their_target():
    """Opened, of the method and for the target that the name says, with layer ids and a card; small enough for a repository."""
    target = open_checkpoint(TARGET)
    for name, folder in heads.shipped().items():
        files = {path.name for path in folder.iterdir()}
        assert files == {"config.json", "model.safetensors", "README.md"}, f"{name}: {sorted(files)}"
        head, (model, _, method) = open_head(name), name.rpartition("-")
        assert model == TARGET and head.config.family == method
        assert head.config.final_feature or head.config.layer_ids is not None, f"{name}: config.json does not say which layers it reads"
        warnings = [w for w in fit(head, target.config, TARGET, target.tokenizer()) if "of a probe text" not in w]
        assert not warnings, f"{name}: {warnings}"
        card = (folder / "README.md").read_text(encoding="utf-8")
        for what, pattern in {"licence": r"^license: \S", "target": rf"^base_model: {TARGET}$", "data": r"^## Data\n\n\d+ texts, \d+ answer tokens", "steps": r"^\| steps \| \d",
                              "acceptance": r"^\| acceptance length, .* \| \d\.\d"}.items():
            assert re.search(pattern, card, re.MULTILINE), f"{name}: the card does not say {what}"
    assert sum(path.stat().st_size for path in heads.FOLDER.rglob("*")) <= MOST_BYTES


def test_heads_that_ship_draft_and_change_nothing(plain):
    for name in heads.shipped():
        said, drafts = generated({"method": name.rpartition("-")[2]})
        assert said == plain and all(drafts), name


@pytest.mark.parametrize("method, flags, good", [("eagle3", [], True), ("mtp", [], True), ("eagle3", ["--layer-ids", "0", "1", "2"], False)], ids=["eagle3", "mtp", "wrong-layers"])
def test_a_rollout_finds_nothing_wrong_with_a_head_that_ships(capsys, method, flags, good):
    """And does with the same head on other layers of the target."""
    if f"{TARGET}-{method}" not in heads.shipped():
        pytest.skip("not in this repository")
    assert main(["inspect", f"{TARGET}-{method}", "--target", TARGET, "--rollout", "24", *flags]) == 0
    out = capsys.readouterr().out
    assert "first draft right in" in out and ("warning: below 30%" not in out) == good, out
