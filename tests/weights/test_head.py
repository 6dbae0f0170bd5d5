"""Every published form of an EAGLE head is read as it is, with its layer ids made boundaries; what is broken or does not fit is refused by name, what looks wrong is warned of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from specrt.cli import main
from specrt.models.config import ModelConfig
from specrt.weights.head import Head, is_head, open_head
from specrt.weights.head_fit import fit
from specrt.weights.inspect import describe
from tests.kit.compare import assert_bits
from tests.kit.heads import Shape, head_tensors, original_config, plain_config, random_head, speculators_config, write_head
from tests.kit.tiny import CONFIGS, tiny_tokenizer, write_folder

S = Shape(norm_before_residual=True)
EAGLE = Shape("eagle", fc_bias=True)
PEAGLE = Shape("peagle", layers=2)
# A target with enough layers for the default boundaries.
TARGET = ModelConfig.from_hf({**CONFIGS["llama"], "num_hidden_layers": 12})


def write(tmp_path, s: Shape = S, config=None, tensors=None, form="safetensors") -> str:
    return str(write_head(tmp_path / "head", config or original_config(s), tensors or head_tensors(s), form))


def opened(tmp_path, **given) -> Head:
    return open_head(write(tmp_path, **given))


def renamed(tensors, rename):
    return {rename(name): t for name, t in tensors.items()}


# ------------------------------------------------------------------------------------------------ forms


def layers0(name):
    return name.replace("midlayer.", "layers.0.")


def fused(tensors):
    """qkv_proj and gate_up_proj, as some exports have them."""
    out = dict(tensors)
    for name, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
        room = name.split(".")[0]
        out[f"midlayer.{name}.weight"] = torch.cat([out.pop(f"midlayer.{room}.{p}_proj.weight") for p in parts])
    return out


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("change", [dict, lambda t: renamed(t, layers0), lambda t: renamed(t, lambda n: "model." + n), fused,
                                    lambda t: {**t, "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(4)}], ids=["midlayer", "layers.0", "model.", "fused", "buffers"])
def test_eagle3_under_every_set_of_names(tmp_path, change, form):
    head, want = opened(tmp_path, tensors=change(head_tensors(S)), form=form), renamed(head_tensors(S), layers0)
    assert set(head.tensors.names()) == set(want)
    for name, tensor in want.items():
        assert head.tensors.shape(name) == tuple(tensor.shape) and torch.equal(head.tensors.get(name), tensor)
    ids = head.target_ids()
    assert torch.equal(ids, want["t2d"].nonzero().flatten())
    c = head.config
    assert (c.family, c.form, c.draft_vocab_size, c.target_hidden_size, c.num_aux, c.norm_before_residual) == ("eagle3", "EAGLE", 100, 128, 3, True)
    assert is_head(head.path)


@pytest.mark.parametrize("s, config", [
    (EAGLE, original_config(EAGLE)), (EAGLE, original_config(EAGLE) | {"bias": True}), (replace(EAGLE, fc_bias=False), original_config(replace(EAGLE, fc_bias=False))),
    (EAGLE, {"model_type": "eagle", "model": {**plain_config(EAGLE), "eagle_fc_bias": True}}),
    (replace(EAGLE, own_embedding=True), original_config(EAGLE)), (replace(EAGLE, input_norms=True), original_config(replace(EAGLE, input_norms=True)))])
def test_eagle(tmp_path, s, config):
    head = opened(tmp_path, s=s, config=config, form="bin")
    assert (head.config.family, head.config.fc_bias, head.config.input_norms, head.own_embedding) == ("eagle", s.fc_bias, s.input_norms, s.own_embedding)
    assert head.config.boundaries(12) == (12,) and head.target_ids() is None and fit(head, TARGET, "t") == []
    assert_bits(head.tensors.get("fc.weight"), head_tensors(s)["fc.weight"])


def test_the_old_speculators_names_of_eagle(tmp_path):
    tensors = renamed(head_tensors(EAGLE), lambda n: n.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer."))
    assert opened(tmp_path, s=EAGLE, config=plain_config(EAGLE, fusion_bias=True, layernorms=False), tensors=tensors).config.fc_bias
    with pytest.raises(ValueError, match="layernorms = true .* must be false or absent"):
        opened(tmp_path, s=EAGLE, config=plain_config(EAGLE, layernorms=True), tensors=tensors)


def test_speculators(tmp_path):
    s = Shape(qk_norm=True, layers=2, norm_before_residual=True, norm_output=True, norm_before_fc=True, window=32, own_embedding=True)
    head = opened(tmp_path, config=speculators_config(s, [2, 6, 9], "google/gemma"), tensors=renamed(head_tensors(s), layers0))
    c = head.config
    assert (c.form, c.norm_before_residual, c.norm_before_fc, c.norm_output, c.fc_norm) == ("speculators", True, True, True, False)
    assert (c.layers.qk_norm, c.layers.windows, c.verifier, c.suggested_tokens) == (True, (32, 32), "google/gemma", 3)
    assert c.boundaries(12) == (2, 6, 9) and "boundaries" in c.ids_read


@pytest.mark.parametrize("key, without", [("norm_before_residual", True), ("norm_before_fc", False), ("fc_norm", False), ("norm_output", False)])
def test_flags_that_a_config_does_not_have(tmp_path, key, without):
    """speculators configs are read as vLLM reads them; others have everything off."""
    config = {k: v for k, v in speculators_config(S).items() if k != key}
    assert getattr(opened(tmp_path, config=config).config, key) is without
    shutil.rmtree(tmp_path / "head")
    assert getattr(opened(tmp_path, config={k: v for k, v in original_config(S).items() if k != key}).config, key) is False


@pytest.mark.parametrize("verifier", [-1, ["org/target"], {}, None, ""])
def test_a_target_without_a_name(tmp_path, verifier):
    head = opened(tmp_path, config=speculators_config(S, verifier=verifier), tensors=renamed(head_tensors(S), layers0))
    assert head.config.verifier is None and not any("made for" in warning for warning in fit(head, TARGET, "org/other"))


def test_flags_that_tensors_or_old_names_show(tmp_path):
    def flags(name, tensors, **more):
        config = open_head(str(write_head(tmp_path / name, {**original_config(Shape()), **more}, tensors))).config
        return config.fc_norm, config.norm_before_fc

    assert flags("a", head_tensors(Shape(fc_norm=True))) == (True, False)
    assert flags("b", head_tensors(Shape(norm_before_fc=True))) == (False, True)
    old = {f"fc_norm.{j}.weight": f"aux_norm_{n}.weight" for j, n in enumerate(("low", "mid", "high"))}
    assert flags("c", renamed(head_tensors(Shape(fc_norm=True)), lambda n: old.get(n, n)), use_aux_norm=True) == (True, False)
    assert flags("d", head_tensors(Shape(norm_before_fc=True)), eagle_config={"norm_before_fc": True}) == (False, True)
    with pytest.raises(ValueError, match="fc_norm.* and norm_before_fc .*exclude each other"):
        flags("e", head_tensors(Shape(norm_before_fc=True)), fc_norm=True)
    with pytest.raises(ValueError, match="'fc_norm.0.weight'"):
        flags("f", head_tensors(Shape()), fc_norm=True)


@pytest.mark.parametrize("more, want", [({}, 7), ({"mask_token_id": None, "ptd_token_id": 8}, 8), ({"mask_token_id": None, "pard_token": 9}, 9), ({"dflash_config": {"mask_token_id": 5}}, 5),
                                        ({"mask_token_id": None}, None)])
def test_peagle(tmp_path, more, want):
    head = opened(tmp_path, config=original_config(PEAGLE, **more), tensors=head_tensors(PEAGLE))
    assert (head.config.family, head.config.mask_token_id, head.config.layers.num_layers) == ("peagle", want, 2) and fit(head, TARGET, "t") == []
    assert "P-EAGLE head" in describe(head.path) and ("not in the config" in describe(head.path)) == (want is None)
    flat = head_tensors(PEAGLE) | {"mask_hidden": head_tensors(PEAGLE)["mask_hidden"][0]}
    config = {k: v for k, v in speculators_config(PEAGLE, mask_token_id=3).items() if k != "norm_before_residual"}
    other = open_head(str(write_head(tmp_path / "flat", config, flat)))
    assert (other.config.family, other.config.mask_token_id, other.config.norm_before_residual) == ("peagle", 3, False)
    with pytest.raises(ValueError, match="mask_token_id = 300, the target has 300 tokens"):
        fit(open_head(str(write_head(tmp_path / "outside", original_config(PEAGLE, mask_token_id=300), head_tensors(PEAGLE)))), TARGET, "t")
    with pytest.raises(ValueError, match=r"'mask_hidden' has shape \[2, 384\]"):
        open_head(str(write_head(tmp_path / "wrong", config, flat | {"mask_hidden": torch.ones(2, 384)})))


def test_a_truncated_vocabulary_by_its_other_name(tmp_path):
    config = original_config(S)
    config["truncated_vocab_size"] = config.pop("draft_vocab_size")
    assert opened(tmp_path, config=config).config.draft_vocab_size == 100


def test_a_head_of_another_width_than_its_target(tmp_path):
    s = Shape(hidden=192, target_hidden=128, own_embedding=True)
    for config in (original_config(s), {k: v for k, v in original_config(s).items() if k != "target_hidden_size"}):
        assert fit(opened(tmp_path, s=s, config=config), TARGET, "t") == []


# ------------------------------------------------------------------------------------------------ layer ids


@pytest.mark.parametrize("config, want", [
    (original_config(S), (2, 6, 9)),
    (original_config(S, [1, 5, 8]), (2, 6, 9)),  # outputs of layers: SpecForge, SGLang
    (original_config(S, [2, 6, 9]), (2, 6, 9)),  # boundaries already
    ({**original_config(S), "eagle_aux_hidden_state_layer_ids": [1, 6, 10]}, (1, 6, 10)),  # top level: boundaries
    (speculators_config(S), (2, 6, 9)),
    (speculators_config(S, [1, 6, 12]), (1, 6, 12)),
    (speculators_config(S, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 6, 9]}), (1, 6, 9))])
def test_layer_ids_become_boundaries(tmp_path, config, want):
    head = opened(tmp_path, config=config)
    assert head.config.boundaries(12) == want
    fit(head, TARGET, "t")
    assert head.overridden((0, 3, 4)).config.boundaries(12) == (0, 3, 4)


def test_a_head_without_captured_layers(tmp_path):
    head = opened(tmp_path, s=replace(S, use_aux=False))
    assert head.config.boundaries(12) == (12,) and "fc.weight" not in head.tensors.names() and fit(head, TARGET, "t") == []


@pytest.mark.parametrize("config, match", [
    (original_config(S, [2, 6, 13]), r"boundaries \[2, 6, 13\] .*from 0 to the target's 12 layers"), (original_config(S, [2, 6, 6]), r"boundaries \[2, 6, 6\] .*must ascend"),
    (original_config(S, [-1, 2, 3]), "from 0 to"), (original_config(S, [1, 6, 12]), r"\[2, 7, 13\] .*outputs of layers: \+ 1")])
def test_layer_ids_that_the_target_has_not(tmp_path, config, match):
    with pytest.raises(ValueError, match=match):
        fit(opened(tmp_path, config=config), TARGET, "t")


def test_more_captured_layers_than_the_default_names(tmp_path):
    s = Shape(num_aux=4)
    head = opened(tmp_path, config=original_config(s, num_aux_hidden_states=4), tensors=head_tensors(s))
    with pytest.raises(ValueError, match="num_aux_hidden_states = 4, and there are no eagle_aux_hidden_state_layer_ids"):
        fit(head, TARGET, "t")
    assert fit(head.overridden((2, 5, 7, 9)), TARGET, "t") == []


def test_layer_ids_that_are_given(tmp_path):
    head = opened(tmp_path, config=original_config(S, [1, 6, 12]))
    assert fit(head.overridden((1, 6, 12)), TARGET, "t") == []
    for ids, match in (((1, 6), "3 captured layers"), ((1, 6, 13), r"\(given\)"), ((6, 1, 2), "must ascend")):
        with pytest.raises(ValueError, match=match):
            fit(head.overridden(ids), TARGET, "t")
    with pytest.raises(ValueError, match="takes the target's last state"):
        open_head(str(random_head(tmp_path / "e", EAGLE))).overridden((1, 6, 9))


# ------------------------------------------------------------------------------------------------ broken heads


def without(name):
    return lambda t: {k: v for k, v in t.items() if k != name}


@pytest.mark.parametrize("change, match", [
    (without("norm.weight"), "1 tensors of this EAGLE-3 head are missing: 'norm.weight'"), (without("fc.weight"), "missing: 'fc.weight'"), (without("d2t"), "missing: 'd2t'"),
    (without("lm_head.weight"), "missing: 'lm_head.weight'"), (without("midlayer.hidden_norm.weight"), "hidden_norm"), (without("midlayer.self_attn.q_proj.weight"), "q_proj.weight'.*missing"),
    (lambda t: {**t, "layers.1.mlp.up_proj.weight": torch.ones(2, 2)}, "do not belong to this EAGLE-3 head: 'layers.1"),
    (lambda t: {**t, "fc.weight": torch.ones(128, 256)}, r"'fc.weight' has shape \[128, 256\], but the config says \[128, 384\]"),
    (lambda t: {**t, "lm_head.weight": t["lm_head.weight"][:99]}, r"'lm_head.weight' has shape \[99, 128\], but the config says \[100, 128\].*draft_vocab_size 100"),
    (lambda t: {**t, "d2t": t["d2t"][:99]}, r"'d2t' has shape \[99\]"), (lambda t: {**t, "t2d": t["t2d"][:299]}, r"'t2d' has shape \[299\], but the config says \[300\]"),
    (lambda t: {**t, "d2t": t["d2t"] + torch.arange(100)}, "'d2t' gives token ids from .* must hold offsets .*held the ids themselves"),
    (lambda t: {**t, "d2t": t["d2t"] - 9}, "'d2t' gives token ids from -"), (lambda t: {**t, "d2t": t["d2t"].flip(0)}, "'d2t' .*(ascending|offsets)"),
    (lambda t: {**t, "t2d": ~t["t2d"]}, "'d2t' and 't2d' disagree"), (lambda t: {**t, "d2t": t["d2t"].float()}, "'d2t' is F32.*int64"),
    (lambda t: {**without("midlayer.hidden_norm.weight")(t), "midlayer.self_attn.q_proj.weight": torch.ones(256, 300)}, "neither an EAGLE nor an EAGLE-3 head: .* 300 input columns"),
    (lambda t: {**t, "norm.weight": t["norm.weight"].to(torch.int32)}, "'norm.weight' is I32")])
def test_a_broken_head_is_refused_by_tensor(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        opened(tmp_path, tensors=change(head_tensors(S)))


@pytest.mark.parametrize("s, config, match", [
    (EAGLE, original_config(EAGLE) | {"bias": False}, "bias = false, but tensor 'fc.bias' is there"), (replace(EAGLE, fc_bias=False), plain_config(EAGLE, bias=True), "bias = true.*missing"),
    (S, speculators_config(S, speculators_model_type="peagle"), "P-EAGLE head are missing: 'mask_hidden'"), (S, speculators_config(S, speculators_model_type="dflash"), "DFlash"),
    (S, speculators_config(S, speculators_model_type="hydra"), "speculators_model_type = 'hydra' is not supported; supported: 'eagle3', 'peagle', 'mtp'"),
    (S, speculators_config(S, transformer_layer_config=None), "transformer_layer_config must be an object"),
    (S, original_config(S) | {"hidden_size": 256}, "has shape .* hidden_size 256"), (S, original_config(S) | {"num_hidden_layers": 2}, "'layers.1"), (S, [], "must hold an object"),
    (S, original_config(S) | {"eagle_aux_hidden_state_layer_ids": ["2"]}, "must be a list of integers"), (S, original_config(S, [1, 2]) | {"num_aux_hidden_states": 3}, "num_aux_hidden_states = 3"),
    (S, original_config(S) | {"eagle_config": [1]}, "eagle_config must be an object"), (S, original_config(S) | {"norm_output": "yes"}, "norm_output must be true or false"),
    (S, original_config(S) | {"model_type": "deepseek_v3"}, "unknown architecture"), (S, original_config(S) | {"layer_types": ["full"]}, "layer_types must list"),
    (S, original_config(S) | {"layer_types": ["sliding_attention"]}, "sliding_window .*missing"),
    (S, original_config(S) | {"architectures": 5}, "architectures must be a list of names, got 5"), (S, original_config(S) | {"architectures": True}, "architectures .* got True"),
    (S, original_config(S) | {"model_type": ["llama"]}, r"model_type must be a name, got \['llama'\]"),
    (S, speculators_config(S, speculators_model_type=["eagle3"]), r"speculators_model_type = \['eagle3'\] is not supported"),
    (S, speculators_config(S, speculators_config={"verifier": {"architectures": 5}}), "architectures must be a list of names, got 5")])
def test_a_broken_config_is_refused_by_key(tmp_path, s, config, match):
    with pytest.raises(ValueError, match=match) as error:
        opened(tmp_path, s=s, config=config or [0])
    assert "head" in str(error.value)


@pytest.mark.parametrize("key, value", [("verifier_accept_k", 2), ("accept_tolerance", 0.1)])
def test_lossy_acceptance_is_refused(tmp_path, key, value):
    config = speculators_config(S)
    config["speculators_config"]["proposal_methods"][0][key] = value
    with pytest.raises(ValueError, match=f"{key} = {value} asks for lossy acceptance"):
        opened(tmp_path, config=config)


def test_no_head_at_all(tmp_path):
    with pytest.raises(ValueError, match="is no folder here; expected the folder of a head, or a hub name"):
        open_head(str(tmp_path / "nothing"))
    model = write_folder(tmp_path / "model", "llama")
    assert not is_head(model)
    with pytest.raises(ValueError, match="no EAGLE head|neither an EAGLE"):
        open_head(str(model))
    folder = random_head(tmp_path / "h", S)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="not a readable safetensors"):
        open_head(str(folder))


# ------------------------------------------------------------------------------------------------ fit


@pytest.mark.parametrize("s, target, match", [
    (S, {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}, "'fc.weight' has 384 input columns; it must have 3 captured layers x the target's hidden size 256 = 768"),
    (EAGLE, {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}, "'fc.weight' has 256 input columns; it must have hidden_size 128 .* = 384"),
    (S, {"vocab_size": 320}, "vocab_size = 300, the target has 320 tokens"), (EAGLE, {"vocab_size": 280}, "vocab_size = 300, the target has 280 tokens"),
    (replace(S, use_aux=False), {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}, "use_aux_hidden_state is false, so hidden_size = 128 must be the target's, 256"),
    (Shape(hidden=192), {}, "no tensor 'embed_tokens.weight', so the target's is used, but hidden_size = 192"),
    (Shape(hidden=192, own_embedding=True, own_lm_head=False, draft=None), {}, "no tensor 'lm_head.weight', so the target's is used"),
    (PEAGLE, {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}, "'fc.weight' has 384 input columns; it must have 3 captured layers"),
    (PEAGLE, {"vocab_size": 320}, "vocab_size = 300, the target has 320 tokens"), (PEAGLE, {"num_hidden_layers": 4}, r"boundaries \[2, 2, 1\] .*must ascend"),
    (Shape("eagle", hidden=192), {}, "no tensor 'embed_tokens.weight', so the target's is used"),
    (Shape("eagle", hidden=192, own_embedding=True), {}, "no tensor 'lm_head.weight', so the target's is used, but hidden_size = 192 and the target's hidden size is 128"),
    (Shape("mtp", hidden=192), {}, "'input_proj.weight' has 384 input columns; it must have hidden_size 192 .* = 320")])
def test_a_head_that_does_not_fit_is_refused(tmp_path, s, target, match):
    with pytest.raises(ValueError, match=match):
        fit(opened(tmp_path, s=s), ModelConfig.from_hf({**CONFIGS["llama"], "num_hidden_layers": 12, **target}), "t")


def with_tokenizer(folder, tokenizer, template=None):
    tokenizer.save(f"{folder}/tokenizer.json")
    if template is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


@pytest.fixture
def target_tokenizer(tmp_path):
    from specrt.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(write_folder(tmp_path / "target", "llama"))


def test_a_padded_vocabulary_is_accepted_with_the_targets_tokenizer(tmp_path, target_tokenizer):
    s = replace(S, own_lm_head=True)
    padded = ModelConfig.from_hf({**CONFIGS["llama"], "num_hidden_layers": 12, "vocab_size": 320})
    folder = write_head(tmp_path / "h", original_config(s), head_tensors(s))
    with pytest.raises(ValueError, match="accepted if the head comes with the target's tokenizer"):
        fit(open_head(str(folder)), padded, "t", target_tokenizer)
    with_tokenizer(folder, tiny_tokenizer())
    fit(open_head(str(folder)), padded, "t", target_tokenizer)
    folder = write_head(tmp_path / "all", original_config(Shape(draft=None)), head_tensors(Shape(draft=None)))
    with_tokenizer(folder, tiny_tokenizer())
    with pytest.raises(ValueError, match="last draft token is 299 .draft_vocab_size., the target has 270 tokens"):
        fit(open_head(str(folder)), ModelConfig.from_hf({**CONFIGS["llama"], "num_hidden_layers": 12, "vocab_size": 270}), "t", target_tokenizer)
    folder = tmp_path / "h"
    with pytest.raises(ValueError, match="last draft token is .*'d2t'.* the target has 270 tokens"):
        fit(open_head(str(folder)), ModelConfig.from_hf({**CONFIGS["llama"], "num_hidden_layers": 12, "vocab_size": 270}), "t", target_tokenizer)


def warnings_of(tmp_path, config, target_name="org/target", tokenizer=None, tensors=None) -> str:
    return "\n".join(fit(opened(tmp_path, config=config, tensors=tensors), TARGET, target_name, tokenizer))


def test_warnings(tmp_path):
    assert warnings_of(tmp_path, speculators_config(S, [2, 6, 9])) == ""
    assert warnings_of(tmp_path, speculators_config(S, [2, 6, 9]), "/models/Target/") == ""
    assert "made for 'org/target' (speculators_config.verifier), and the target is 'other'" in warnings_of(tmp_path, speculators_config(S, [2, 6, 9]), "other")
    config = speculators_config(S, [2, 6, 9])
    config["speculators_config"]["verifier"]["architectures"] = ["Qwen3ForCausalLM"]
    assert "made for Qwen3ForCausalLM" in warnings_of(tmp_path, config)
    assert "captures boundary 11 of a target with 12 layers" in warnings_of(tmp_path, speculators_config(S, [2, 6, 11]))
    assert "SpecForge heads from before" in warnings_of(tmp_path, original_config(S, norm_output=True, architectures=["LlamaForCausalLMEagle3"]))
    assert warnings_of(tmp_path, original_config(S, norm_output=True)) == ""


def test_warnings_of_the_text(tmp_path, target_tokenizer):
    assert "covers only" in warnings_of(tmp_path, original_config(S), tokenizer=target_tokenizer)
    full = Shape(draft=280)
    tensors = head_tensors(full) | {"d2t": torch.zeros(280, dtype=torch.int64), "t2d": torch.arange(300) < 280}
    config = original_config(full)
    assert warnings_of(tmp_path, config, tokenizer=target_tokenizer, tensors=tensors) == ""
    with_tokenizer(tmp_path / "head", tiny_tokenizer(), "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert warnings_of(tmp_path, config, tokenizer=target_tokenizer, tensors=tensors) == "the head comes with another chat template than the target's"
    other = tiny_tokenizer()
    other.add_tokens(["speculative"])
    with_tokenizer(tmp_path / "head", other)
    assert "another tokenizer" in warnings_of(tmp_path, config, tokenizer=target_tokenizer, tensors=tensors)


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_says_what_a_head_is_and_whether_it_fits(tmp_path):
    target = write_folder(tmp_path / "target", {**CONFIGS["llama"], "num_hidden_layers": 12})
    head = random_head(tmp_path / "head", Shape(fc_norm=True, norm_output=True), [1, 5, 8])
    lines = dict(line.split("  ", 1) for line in describe(head, target).splitlines() if not line.startswith("warning"))
    found = {key.strip(): value.strip() for key, value in lines.items()}
    assert (found["kind"], found["format"], found["flags"]) == ("EAGLE-3 head (3.1), method 'eagle3'", "EAGLE", "fc_norm, norm_output")
    assert found["features"] == "boundaries [2, 6, 9] (eagle_config's [1, 5, 8], outputs of layers: + 1)" and found["captures"] == "boundaries [2, 6, 9] of 12 layers"
    assert found["draft vocabulary"] == "100 tokens of the target's" and found["own"] == "lm_head; the rest is the target's" and found["fits as draft of"].endswith("yes")
    assert "warning" in describe(head, target) and "fits" not in describe(head)
    assert "boundaries [2, L/2, L-3] of a target" in describe(random_head(tmp_path / "default", S))
    assert "the target's last state after its norm" in describe(random_head(tmp_path / "eagle", EAGLE))
    speculators = describe(write_head(tmp_path / "spec", speculators_config(S, [2, 6, 9]), head_tensors(S)))
    assert "made for org/target" in speculators and "num_speculative_tokens 3" in speculators
    with pytest.raises(ValueError, match="'fc.weight' has 384 input columns"):
        describe(head, write_folder(tmp_path / "wide", {**CONFIGS["llama"], "num_hidden_layers": 12, "hidden_size": 256}))


def test_inspect_takes_what_the_user_knows_better(tmp_path, capsys):
    target = str(write_folder(tmp_path / "target", {**CONFIGS["llama"], "num_hidden_layers": 12}))
    head = str(random_head(tmp_path / "head", Shape("peagle", norm_output=True), [2, 6, 11], seed=1))

    def said(*flags) -> dict[str, str]:
        assert main(["inspect", head, "--target", target, *flags]) == 0
        lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
        return {key: "\n".join(value.strip() for other, value in lines if other == key) for key, _ in lines}

    plain, given = said(), said("--layer-ids", "1", "6", "12", "--no-norm-output", "--mask-token-id", "9")
    assert plain["features"] == "boundaries [2, 6, 11] (eagle_config's [2, 6, 11], boundaries)" and given["features"] == "boundaries [1, 6, 12] (given)"
    assert (plain["captures"], given["captures"]) == ("boundaries [2, 6, 11] of 12 layers", "boundaries [1, 6, 12] of 12 layers")
    assert (plain["mask token"], given["mask token"]) == ("7", "9") and (plain["flags"], given["flags"]) == ("norm_output", "none")
    assert "captures boundary 11" in plain["warning"] and "captures boundary" not in given["warning"]
    for flags, message in ((["--layer-ids", "1", "6"], "3 captured layers"), (["--layer-ids", "1", "6", "13"], r"[1, 6, 13] (given); they must be from 0 to the target's 12"),
                           (["--mask-token-id", "300"], "mask_token_id = 300, the target has 300 tokens")):
        assert main(["inspect", head, "--target", target, *flags]) == 2
        assert message in capsys.readouterr().err
    for other, flags, message in ((str(random_head(tmp_path / "e", EAGLE)), ["--norm-output"], "norm_output = True has no meaning"),
                                  (str(random_head(tmp_path / "three", S)), ["--mask-token-id", "3"], "mask_token_id = 3 has no meaning"),
                                  (target, ["--layer-ids", "1"], "is no draft head, which has no such setting")):
        assert main(["inspect", other, *flags]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:head .* the draft vocabulary")
def test_a_rollout_takes_the_overrides_too(tmp_path, capsys):
    target = write_folder(tmp_path / "target", {**CONFIGS["llama"], "num_hidden_layers": 3})
    head = random_head(tmp_path / "head", S, [0, 1, 9])
    flags = ["inspect", str(head), "--target", str(target), "--rollout", "4"]
    assert main(flags) == 2 and "[0, 1, 9]" in capsys.readouterr().err
    assert main([*flags, "--layer-ids", "0", "1", "2"]) == 0 and "of 4 rounds" in capsys.readouterr().out


def test_inspect_runs_a_rollout(tmp_path, capsys):
    target = write_folder(tmp_path / "target", {**CONFIGS["llama"], "num_hidden_layers": 12})
    head = random_head(tmp_path / "head", S, [2, 6, 9])
    with pytest.warns(UserWarning, match="covers only"):
        assert main(["inspect", str(head), "--target", str(target), "--rollout", "12"]) == 0
    out = capsys.readouterr().out
    assert "first draft right in" in out and "of 12 rounds" in out and "warning: below 30%" in out
    assert main(["inspect", str(head), "--rollout"]) == 2
