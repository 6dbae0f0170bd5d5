"""Scales of an FP8 cache in checkpoints: every published name, and what is refused."""

import json

import pytest
import torch

from specrt import LLM, ops
from specrt.models.config import ModelConfig
from specrt.models.dense import DenseModel
from specrt.weights import open_checkpoint
from specrt.weights.inspect import describe
from tests.kit.compare import assert_bits
from tests.kit.forward import Sequence
from tests.kit.tiny import CONFIGS, random_tensors, write_folder, write_weights

CONFIG = ModelConfig.from_hf(CONFIGS["qwen3"])
SCALES = [(0.5, 0.25), (0.013, 0.7), (2.0, 0.031)]
FORMS = {"k_scale": ("k_scale", "v_scale"), "attn": ("attn.k_scale", "attn.v_scale"), "modelopt": ("k_proj.k_scale", "v_proj.v_scale"),
         "output_scale": ("k_proj.output_scale", "v_proj.output_scale")}
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def named(form="k_scale", scales=SCALES, shape=(1,)):
    return {f"model.layers.{i}.self_attn.{name}": torch.full(shape, scale) for i, pair in enumerate(scales) for name, scale in zip(FORMS[form], pair)}


def write(folder, extra, scheme=None):
    write_folder(folder, "qwen3")
    write_weights(folder, random_tensors(CONFIG) | extra)
    if scheme is not None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder, kv_dtype=ops.FP8):
    return DenseModel.load(open_checkpoint(folder), torch.float32, "cpu", kv_dtype=kv_dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_are_found_under_every_name(tmp_path, form, shape):
    folder = write(tmp_path / "m", named(form, shape=shape) | {"model.layers.0.self_attn.q_scale": torch.ones(1)}, SCHEME)
    model = load(folder)
    assert model.kv_scales == [tuple(torch.tensor(pair).tolist()) for pair in SCALES] and model.kv_dtype == ops.FP8
    assert "of 3 of 3 layers" in describe(folder)


def test_one_scale_for_both_and_layers_without(tmp_path):
    assert load(write(tmp_path / "m", {"model.layers.1.self_attn.kv_scale": torch.tensor(0.5)})).kv_scales == [(1.0, 1.0), (0.5, 0.5), (1.0, 1.0)]
    assert load(write(tmp_path / "none", {})).kv_scales == [(1.0, 1.0)] * 3 and "KV scales" not in describe(tmp_path / "none")


def test_they_count_for_an_fp8_cache_alone(tmp_path, device):
    scaled, plain = write(tmp_path / "scaled", named()), write(tmp_path / "plain", {})
    tokens = list(range(3, 60))

    def logits(folder, kv_dtype):
        return Sequence(DenseModel.load(open_checkpoint(folder), torch.float32, device, kv_dtype=kv_dtype)).prefill(tokens)

    wide, narrow = logits(plain, None), [logits(folder, ops.FP8) for folder in (plain, scaled)]
    assert_bits(logits(scaled, None), wide)
    assert not torch.equal(*narrow)
    for got in narrow:  # e4m3 has 4 significant bits
        assert 1e-3 < (got - wide).norm() / wide.norm() < 0.15


def test_the_pool_of_an_engine_has_them(tmp_path):
    with LLM(write(tmp_path / "m", named()), device="cpu", dtype="float32", kv_cache_dtype="fp8", speculative_config={"method": "draft_model", "model": str(tmp_path / "m")}) as llm:
        rounds = llm._engine.round
        for pool in (rounds.pool, rounds.drafters["draft_model"].pool):
            assert pool.k.dtype == pool.v.dtype == ops.FP8
            assert [pytest.approx((layer.k_scale, layer.v_scale)) for layer in pool.layers()] == SCALES


@pytest.mark.parametrize("extra, scheme, words", [
    (named(scales=SCALES[:2]) | {"model.layers.2.self_attn.k_scale": torch.ones(1)}, None, "'model.layers.2.self_attn.k_scale' stands alone"),
    (named() | named("modelopt"), None, "layer 0 has two scales for its k: .*k_scale' and '"),
    (named(shape=(2, 1, 1)), None, r"k_scale' is F32 of shape \[2, 1, 1\]"),
    ({k: v.to(torch.int8) for k, v in named().items()}, None, "k_scale' is I8"),
    (named(scales=[(0.0, 1.0)]), None, "k_scale' = 0.0 .* finite number > 0"),
    (named(scales=[(1.0, float("nan"))]), None, "v_scale' = nan .* finite number > 0"),
    (named(scales=[*SCALES, (1.0, 1.0)]), None, "for layer 3, and the model has 3 layers"),
    (named(), {**SCHEME, "type": "int"}, "kv_cache_scheme .*'int'.* not supported"),
    (named(), {**SCHEME, "strategy": "attn_head"}, "kv_cache_scheme .*'attn_head'.* not supported")])
def test_what_is_no_scale_is_refused_where_it_would_count(tmp_path, extra, scheme, words):
    folder = write(tmp_path / "m", extra, scheme)
    load(folder, None)
    with pytest.raises(ValueError, match=f"m: .*{words}"):
        load(folder)
    with pytest.raises(ValueError, match=words):
        LLM(folder, device="cpu", kv_cache_dtype="fp8")
