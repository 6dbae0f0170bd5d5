"""MiMo: the target and the MTP module in its files; modules alone; what is refused. The network's parity and rounds: test_head_network.py, test_head_drafter.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specrt import LLM, SamplingParams
from specrt.models.config import ModelConfig
from specrt.models.dense import DenseModel
from specrt.weights import open_checkpoint
from specrt.weights.head import is_head, open_head
from specrt.weights.head_fit import fit
from specrt.weights.inspect import describe
from tests.kit.compare import assert_bits
from tests.kit.forward import Sequence
from tests.kit.heads import MTP, Shape, head_tensors, random_head, speculators_config, write_head
from tests.kit.tiny import CONFIGS, random_tensors, write_folder, write_weights

S = Shape("mtp", bias=True, intermediate=224, heads=2, kv_heads=1)  # the layer of the target below
QWEN2 = {**CONFIGS["qwen2"], "hidden_size": 128, "num_attention_heads": 2, "tie_word_embeddings": False}
MIMO = {**QWEN2, "model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}


@pytest.fixture
def mimo(tmp_path):
    """MiMo as it is published: one repository, the module beside the model's layers."""
    folder = write_folder(tmp_path / "mimo", MIMO)
    write_weights(folder, random_tensors(ModelConfig.from_hf(MIMO)) | head_tensors(S))
    return folder


def test_the_target_is_a_qwen2_and_does_not_see_the_module(mimo, tmp_path, device):
    tokens = [(11 * i + 3) % 300 for i in range(40)]
    other = write_folder(tmp_path / "qwen2", QWEN2)
    a, b = (Sequence(DenseModel.load(open_checkpoint(folder), torch.bfloat16, device)).prefill(tokens) for folder in (mimo, other))
    assert_bits(a, b)
    assert open_checkpoint(mimo).config.architecture == "mimo" and not is_head(mimo)


def test_the_module_comes_with_its_target(mimo, device):
    prompts, params = [[5, 6, 7, 8], [9] * 20], SamplingParams(temperature=1.0, seed=2, max_tokens=24, ignore_eos=True)
    found = []
    for spec in (None, dict(method="mtp", num_speculative_tokens=1), dict(method="mtp", num_speculative_tokens=3), dict(method="mtp", model=str(mimo), num_draft_tokens=9)):
        with LLM(mimo, device=device, max_model_len=128, speculative_config=spec) as llm:
            outs = llm.generate(prompts, params)
            found.append([out.token_ids for out in outs])
            assert spec is None or all(out.stats.num_draft_tokens > 0 for out in outs)
    assert all(tokens == found[0] for tokens in found)


def test_a_module_alone(tmp_path, mimo):
    """The layout of a module trained for another model: its layer's config and the module's tensors."""
    folder = random_head(tmp_path / "module", S)
    assert is_head(folder)
    head = open_head(str(folder))
    assert (head.config.family, head.config.layers.attention_bias, head.config.boundaries(3)) == ("mtp", True, (3,)) and fit(head, ModelConfig.from_hf(MIMO), "t") == []
    assert torch.equal(head.tensors.get("fc.weight"), open_head(str(mimo)).tensors.get("fc.weight"))
    text = describe(folder, mimo)
    assert "MTP module, method 'mtp'" in text and "the target's last state after its norm" in text and "neither embedding nor lm_head" in text and ": yes" in text


Q = Shape("mtp", qk_norm=True, embedding_first=True)
QWEN3 = {**CONFIGS["qwen3"], "num_hidden_layers": 12}


def test_a_module_in_speculators_form(tmp_path):
    """mtp_layers.0.* beside a config that holds the target's, with its 12 layers; the module is one of them."""
    folder = random_head(tmp_path / "module", Q)
    assert is_head(folder)
    head = open_head(str(folder))
    c = head.config
    assert (c.family, c.form, c.embedding_first, c.norm_output, c.layers.num_layers, c.layers.qk_norm, c.suggested_tokens) == ("mtp", "speculators", True, True, 1, True, 3)
    assert c.verifier == "org/target" and fit(head, ModelConfig.from_hf(QWEN3), "org/target") == [] and "made for 'org/target'" in fit(head, ModelConfig.from_hf(QWEN3), "other")[0]
    shapes = {name: head.tensors.shape(name) for name in head.tensors.names()}
    assert shapes == {"fc.weight": (128, 256), "token_layernorm.weight": (128,), "hidden_layernorm.weight": (128,), "norm.weight": (128,), "layers.0.input_layernorm.weight": (128,),
                      "layers.0.post_attention_layernorm.weight": (128,), "layers.0.self_attn.q_proj.weight": (256, 128), "layers.0.self_attn.k_proj.weight": (128, 128),
                      "layers.0.self_attn.v_proj.weight": (128, 128), "layers.0.self_attn.o_proj.weight": (128, 256), "layers.0.self_attn.q_norm.weight": (64,),
                      "layers.0.self_attn.k_norm.weight": (64,), "layers.0.mlp.gate_proj.weight": (160, 128), "layers.0.mlp.up_proj.weight": (160, 128), "layers.0.mlp.down_proj.weight": (128, 160)}
    target = write_folder(tmp_path / "target", QWEN3)
    text = describe(folder, target)
    assert "speculators" in text and "MTP module, method 'mtp'" in text and "num_speculative_tokens 3" in text and "norm_output, embedding_first" in text and ": yes" in text
    found = []
    for spec in (None, dict(method="mtp", model=str(folder))):
        with LLM(target, device="cpu", max_model_len=64, speculative_config=spec) as llm:
            found.append(llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=12, ignore_eos=True))[0])
    assert found[0].token_ids == found[1].token_ids and found[1].stats.num_draft_tokens > 0


@pytest.mark.parametrize("config, change, match", [
    ({}, {"mtp_layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 128)}, "do not belong to this MTP module: 'mtp_layers.0.mlp.experts.gate_up_proj'"),
    ({}, {"masked_embedding.centroids.weight": torch.ones(4, 128)}, "do not belong to this MTP module: 'masked_embedding.centroids.weight'"),
    ({}, {"d2t": torch.zeros(100, dtype=torch.int64)}, "do not belong to this MTP module: 'd2t'"),
    ({"transformer_layer_config": {**QWEN3, "model_type": "qwen3_next"}}, {}, "module/config.json: unknown architecture: model_type 'qwen3_next'"),
    ({"transformer_layer_config": None}, {}, "transformer_layer_config must be an object"), ({"speculators_model_type": "eagle3"}, {}, "tensors of this EAGLE head are missing|do not belong to this EAGLE head"),
    ({"speculators_config": {"proposal_methods": [{"verifier_accept_k": 2}]}}, {}, "verifier_accept_k = 2 asks for lossy acceptance")])
def test_what_of_speculators_form_is_refused(tmp_path, config, change, match):
    """Mixtures of experts, Qwen3-Next's norms and gates, a vocabulary of its own: not what the layer here computes."""
    tensors = {name.removeprefix("model."): t for name, t in head_tensors(Q).items()} | change
    with pytest.raises(ValueError, match=match):
        open_head(str(write_head(tmp_path / "module", speculators_config(Q) | config, tensors)))


def test_a_config_of_a_module_without_one(tmp_path):
    with pytest.raises(ValueError, match="tensors of this MTP module are missing: 'hidden_layernorm.weight'"):
        open_head(str(write_head(tmp_path / "head", speculators_config(Q), head_tensors(Shape("eagle")))))


@pytest.mark.parametrize("change, match", [
    (lambda t: {k: v for k, v in t.items() if not k.endswith("input_proj.weight")}, "tensors of this MTP module are missing: 'fc.weight'"),
    (lambda t: {**t, MTP + "enorm.weight": torch.ones(128)}, "do not belong to this MTP module: 'model.mtp_layers.0.enorm.weight'"),
    (lambda t: {**t, "lm_head.weight": torch.ones(300, 128)}, "do not belong to this MTP module: 'lm_head.weight'"),
    (lambda t: {**t, MTP + "input_proj.weight": torch.ones(128, 384)}, r"'model.mtp_layers.0.input_proj.weight' has shape \[128, 384\], but the config says \[128, 256\]"),
    (lambda t: t | {k.replace("layers.0", "layers.1"): v.clone() for k, v in t.items()}, "holds 2 MTP modules, which is not supported; it must be one")])
def test_a_broken_module_is_refused(tmp_path, change, match):
    folder = random_head(tmp_path / "module", S)
    write_weights(folder, change(head_tensors(S)))
    with pytest.raises(ValueError, match=match):
        open_head(str(folder))


def test_a_module_that_does_not_fit_is_refused(tmp_path, mimo):
    with pytest.raises(ValueError, match="'input_proj.weight' has 384 input columns; it must have hidden_size 192 .* = 320"):
        fit(open_head(str(random_head(tmp_path / "wide", replace(S, hidden=192)))), ModelConfig.from_hf(MIMO), "t")
    with pytest.raises(ValueError, match="vocab_size = 280, the target has 300 tokens"):
        fit(open_head(str(random_head(tmp_path / "vocab", replace(S, vocab=280)))), ModelConfig.from_hf(MIMO), "t")
    with pytest.raises(ValueError, match="'model'. is missing, and the target holds no MTP module"):
        LLM(write_folder(tmp_path / "plain", QWEN2), device="cpu", speculative_config=dict(method="mtp"))
