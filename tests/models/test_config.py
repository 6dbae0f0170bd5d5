import json
import math

import pytest
import transformers

from specrt.models.config import ModelConfig
from tests.kit.tiny import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_transformers_5_writes(name, tmp_path):
    """Old keys (rope_theta + rope_scaling) and new ones (rope_parameters) give one config."""
    ours = ModelConfig.from_hf(CONFIGS[name])
    theirs = transformers.AutoConfig.for_model(**CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in rewritten and "rope_scaling" not in rewritten
    again = ModelConfig.from_hf({"tie_word_embeddings": CONFIGS[name]["tie_word_embeddings"], **rewritten})
    assert again == ours


def test_defaults_of_absent_keys():
    bare = {k: v for k, v in CONFIGS["mistral"].items() if k not in ("sliding_window", "head_dim", "num_key_value_heads", "rope_theta", "architectures")}
    c = ModelConfig.from_hf(bare)
    assert c.windows == (4096,) * 3 and c.head_dim == 64 and c.num_kv_heads == 2 and c.rope_theta == 10000.0
    assert ModelConfig.from_hf({**bare, "sliding_window": None}).windows == (0, 0, 0)
    qwen3 = {k: v for k, v in CONFIGS["qwen3"].items() if k != "head_dim"}
    assert ModelConfig.from_hf(qwen3).head_dim == 128


def test_windows_of_qwen():
    on = {**CONFIGS["qwen2"], "use_sliding_window": True, "sliding_window": 32}
    assert ModelConfig.from_hf({**on, "max_window_layers": 2}).windows == (0, 0, 32)
    assert ModelConfig.from_hf({**on, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}).windows == (32, 0, 0)
    assert ModelConfig.from_hf({**on, "use_sliding_window": False}).windows == (0, 0, 0)


def test_eos_of_both_files_and_of_a_nested_config():
    nested = {"model_type": "llava", "eos_token_id": [5, 6], "text_config": {k: v for k, v in CONFIGS["llama"].items() if k not in ("eos_token_id", "architectures")}}
    c = ModelConfig.from_hf(nested, {"eos_token_id": [6, 7]})
    assert c.eos_token_ids == (5, 6, 7) and c.architecture == "llama"


BAD = [
    ({"model_type": "gpt2"}, "model_type 'gpt2'.*llama, mistral, qwen2, qwen3"),
    ({"model_type": None, "architectures": ["FooForCausalLM"]}, "unknown architecture 'FooForCausalLM'"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*LlamaForCausalLM"),
    ({"model_type": ["llama"]}, r"model_type must be a name, got \['llama'\]"),
    ({"model_type": {"llama": 1}}, "model_type must be a name, got {'llama': 1}"),
    ({"architectures": "Llama"}, "architectures must be a list"),
    ({"architectures": True}, "architectures must be a list of names, got True"),
    ({"architectures": [5]}, r"architectures must be a list of names, got \[5\]"),
    ({"hidden_size": None}, "hidden_size must be an integer >= 1 and <= 2147483647, and it is missing"),
    ({"hidden_size": 128.0}, "hidden_size.*128.0"),
    ({"hidden_size": True}, "hidden_size.*True"),
    ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers must be an integer >= 1 and <= 4096, got 2000000000"),
    ({"num_hidden_layers": 0}, "num_hidden_layers.*0"),
    ({"num_attention_heads": 3}, "hidden_size = 128 is not a multiple"),
    ({"num_key_value_heads": 3, "head_dim": 64}, "not a multiple of num_key_value_heads = 3"),
    ({"head_dim": 33}, "head_dim = 33 is odd"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a finite number > 0, got nan"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps.*'1e-5'"),
    ({"rope_theta": math.inf}, "rope_theta.*inf"),
    ({"rope_theta": -1}, "rope_theta.*-1"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'.*default, linear, llama3"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor.*missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}}, "low_freq_factor = 4.0 must be below"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu'"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings.*'yes'"),
    ({"eos_token_id": "</s>"}, "eos_token_id.*'</s>'"),
    ({"eos_token_id": [1, 300]}, "eos_token_id = 300 is outside the vocabulary of 300"),
    ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
    ({"text_config": 3}, "text_config must be an object"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_a_bad_key_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**CONFIGS["llama"], **change})


@pytest.mark.parametrize("change, message", [
    ({"sliding_window": 0}, "sliding_window.*0"), ({"sliding_window": "big"}, "sliding_window.*'big'"), ({"layer_types": ["full_attention"]}, "layer_types must list"),
    ({"max_window_layers": -1}, "max_window_layers.*-1"), ({"use_sliding_window": 1}, "use_sliding_window must be true or false")])
def test_a_bad_window_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**CONFIGS["qwen2-window"], **change})
