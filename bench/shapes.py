"""config.json of the shapes that are measured with random weights."""

from __future__ import annotations

from typing import Any

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 2}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {**_LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "rope_theta": 500000.0, "tie_word_embeddings": False},
    "llama-1b": {**_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "rope_theta": 500000.0, "tie_word_embeddings": True},
    "smollm2": {**_LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "rope_theta": 100000.0, "tie_word_embeddings": True},
    "mimo-7b": {**_LLAMA, "model_type": "mimo", "architectures": ["MiMoForCausalLM"], "vocab_size": 151680, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 640000.0, "tie_word_embeddings": False},
}
TITLES = {"llama-8b": "Llama-3.1-8B", "llama-1b": "Llama-3.2-1B", "smollm2": "SmolLM2-135M", "mimo-7b": "MiMo-7B"}
