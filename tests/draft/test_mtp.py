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
from tests.kit.heads import MTP, Shape, head_tensors, random_head
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


@pytest.mark.parametrize("change, match", [
    (lambda t: {k: v for k, v in t.items() if not k.endswith("input_proj.weight")}, "tensors of this MTP module are missing: 'fc.weight'"),
    (lambda t: {**t, MTP + "enorm.weight": torch.ones(128)}, "do not belong to this MTP module: 'model.mtp_layers.0.enorm.weight'"),
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
