"""Checkpoints with FP8 weights, as compressed-tensors and DeepSeek write them, and FP8 at load."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from specrt.models.dense import DenseModel
from specrt.weights import open_checkpoint
from specrt.weights.fp8 import Fp8Source, quantized
from specrt.weights.inspect import describe
from tests.kit.compare import assert_bits, relative_error
from tests.kit.forward import Sequence
from tests.kit.tiny import CONFIGS, write_folder

FP8 = torch.float8_e4m3fn
TOKENS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def compressed(strategy, **weights):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **weights}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}}}}


DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
# Name -> quantization_config, strategy, suffix of the scales, their dtype.
FORMATS = {"channel": (compressed("channel"), "channel", "_scale", torch.bfloat16), "tensor": (compressed("tensor"), "tensor", "_scale", torch.float32),
           "block": (compressed("block", block_structure=[128, 128]), "block", "_scale", torch.float32), "deepseek": (DEEPSEEK, "block", "_scale_inv", torch.float32),
           "static": (STATIC, "tensor", "_scale", torch.float32)}


def encode(weight, strategy, dtype):
    """(values, scale as stored, their product in float32)."""
    n, k = weight.shape
    size = {"tensor": (n, k), "channel": (1, k), "block": (128, 128)}[strategy]
    scale = torch.empty(-(-n // size[0]), -(-k // size[1]))
    whole = torch.empty_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1])
            scale[i, j] = whole[part] = (weight[part].abs().max() / 448).to(dtype).float()
    values = (weight / whole).clamp(-448, 448).to(FP8)
    return values, (scale.reshape(()) if strategy == "tensor" else scale).to(dtype), values.float() * whole


def write_fp8(tmp_path, name, change=lambda tensors: None, config="qwen2", **quantization):
    """Two folders: quantised, and the same weights dequantised."""
    given, strategy, suffix, dtype = FORMATS[name]
    plain, folder = write_folder(tmp_path / "plain", config), write_folder(tmp_path / "fp8", config)
    tensors, stored = load_file(folder / "model.safetensors"), {}
    for key, t in list(tensors.items()):
        if "_proj.weight" in key:
            stored[key], stored[key + suffix], tensors[key] = encode(t, strategy, dtype)
            if name == "static":
                stored[key.replace(".weight", ".input_scale")] = torch.tensor(0.02)
    save_file(tensors, plain / "model.safetensors")
    stored = {**tensors, **stored}
    change(stored)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIGS[config], "quantization_config": {**given, **quantization}}))
    return folder, plain


@pytest.mark.parametrize("name", FORMATS)
def test_stored_weights_are_read_as_they_are(tmp_path, name):
    folder, plain = write_fp8(tmp_path, name)
    got, want = open_checkpoint(folder), open_checkpoint(plain)
    assert isinstance(got.tensors, Fp8Source) and set(got.tensors.names()) == set(want.tensors.names())
    for key in want.tensors.names():
        assert_bits(got.tensors.get(key), want.tensors.get(key))


@pytest.mark.parametrize("config", ["qwen2", "llama-linear"])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_near_those_of_the_dequantised_weights(tmp_path, device, name, config):
    """What is left is the activations' quantisation; the weights are the same numbers. A wrong scale gives errors of order 1."""
    folder, plain = write_fp8(tmp_path, name, config=config)
    model = DenseModel.load(open_checkpoint(folder), torch.float32, device)
    got, want = Sequence(model).prefill(TOKENS), Sequence(DenseModel.load(open_checkpoint(plain), torch.float32, device)).prefill(TOKENS)
    assert relative_error(got, want) < 0.08
    assert_bits(Sequence(model, page_size=64).decode(TOKENS), got)


def test_quantisation_at_load(tmp_path, device):
    folder = write_folder(tmp_path / "m", "llama-linear")
    exact = Sequence(DenseModel.load(open_checkpoint(folder), torch.float32, device)).prefill(TOKENS)
    model = DenseModel.load(open_checkpoint(folder), torch.float32, device, "fp8")
    assert 1e-4 < relative_error(Sequence(model).prefill(TOKENS), exact) < 0.15  # each operand of a product carries about 2.6 %
    assert model.layers[0].down.weight.dtype == FP8 and model.lm_head.weight.dtype == torch.float32


def test_quantised_weights_are_the_nearest():
    weight = torch.randn(50, 200) * torch.logspace(-6, 6, 50)[:, None]
    weight[7] = 0
    values, scale = quantized(weight)
    assert scale.shape == (1, 50) and scale[0, 7] == 1 and values[7].float().abs().max() == 0
    got = quantized(weight).dequantized()
    assert_bits(got, values.float() * scale.T)
    assert ((got - weight).abs() <= weight.abs() * 2**-4 + scale.T * 2**-9).all()
    with pytest.raises(ValueError, match="not finite"):
        quantized(torch.tensor([[1.0, float("inf")]]))


def test_inspect_says_so(tmp_path):
    folder, _ = write_fp8(tmp_path, "deepseek")
    said = describe(folder)
    assert "fp8 (e4m3), a scale for each block of 128 x 128; 21 matrices" in said and "F8_E4M3" in said


Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "no scale": (lambda t: t.pop(Q + "_scale"), {}, f"'{Q}' is F8_E4M3 and has no scale"),
    "scale alone": (lambda t: t.pop(Q), {}, f"'{Q}_scale' is the scale of '{Q}', which is not stored"),
    "scale of bf16": (lambda t: t.update({Q: t[Q].to(torch.bfloat16)}), {}, "which is BF16, not F8_E4M3"),
    "scale's shape": (lambda t: t.update({Q + "_scale": torch.ones(3, 1)}), {}, r"'.*_scale' has shape \[3, 1\], but a weight of \[256, 256\] quantised by channel has \[256, 1\]"),
    "scale's dtype": (lambda t: t.update({Q + "_scale": torch.ones(256, 1, dtype=torch.int32)}), {}, "'.*_scale' is I32"),
    "two scales": (lambda t: t.update({Q + "_scale_inv": torch.ones(256, 1)}), {}, "has two scales"),
    "int8": (lambda t: None, compressed("channel", type="int"), "weights of type 'int' with num_bits 8"),
    "groups": (lambda t: None, compressed("group"), "weight strategy 'group' is not supported"),
    "block": (lambda t: None, {**DEEPSEEK, "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
    "e5m2": (lambda t: None, {**DEEPSEEK, "fmt": "e5m2"}, "fmt 'e5m2'"),
    "two groups": (lambda t: None, {"config_groups": {}}, "config_groups must hold one group"),
    "gptq": (lambda t: None, {"quant_method": "gptq"}, "method 'gptq' is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_name(tmp_path, case):
    change, quantization, message = BAD[case]
    folder, _ = write_fp8(tmp_path, "channel", change, **quantization)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_numbers_that_are_not_finite_are_refused_when_they_are_read(tmp_path):
    def spoil(tensors):
        tensors[Q].view(torch.uint8)[3, 4] = 0x7F

    folder, _ = write_fp8(tmp_path, "channel", spoil)
    with pytest.raises(ValueError, match="not finite"):
        DenseModel.load(open_checkpoint(folder), torch.float32, "cpu")


def test_stacked_weights_of_two_kinds_are_refused(tmp_path):
    def widen(tensors):
        tensors.pop(Q + "_scale")
        tensors[Q] = tensors[Q].to(torch.float32)

    folder, _ = write_fp8(tmp_path, "channel", widen)
    with pytest.raises(ValueError, match="k_proj.weight' is FP8.*all must be or none"):
        DenseModel.load(open_checkpoint(folder), torch.float32, "cpu")
