"""transformers with the weights of our own checkpoint loader: the peer of bench_cpu.py and bench_gpu.py."""

from __future__ import annotations

import time
from typing import Any

import torch

from specrt.weights import Checkpoint


def config_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """The Hugging Face config.json of a Llama checkpoint with plain RoPE (SmolLM2 is one)."""
    c = checkpoint.config
    if c.architecture != "llama" or c.rope_scaling is not None:
        raise ValueError(f"the peer is for Llama checkpoints without RoPE scaling, got {c.architecture} with rope_scaling = {c.rope_scaling}")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size, "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim, "rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta,
            "max_position_embeddings": c.max_position_embeddings, "tie_word_embeddings": c.tie_word_embeddings,
            "bos_token_id": c.bos_token_id, "eos_token_id": list(c.eos_token_ids) or None}


class Transformers:
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu"):
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(LlamaConfig(**config_json(checkpoint))).eval()
        weights = {name: checkpoint.tensors.get(name).float() for name in checkpoint.tensors.names()}
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"transformers and the checkpoint disagree: missing {missing}, unexpected {unexpected}")
        self.model.tie_weights()
        self.model.to(device, dtype)
        self.eos = checkpoint.config.eos_token_ids

    def generate(self, prompts: list[list[int]], max_tokens: int, **options: Any) -> tuple[list[list[int]], float]:
        """Greedy, all prompts in one batch. Returns each one's new tokens, up to the one that ended it, and the seconds of the whole call."""
        longest, pad = max(map(len, prompts)), self.eos[0]
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=max_tokens, pad_token_id=pad, eos_token_id=list(self.eos), **options)
        rows = out[:, longest:].tolist()  # waits for the device
        seconds = time.perf_counter() - start
        return [row[: next((i + 1 for i, token in enumerate(row) if token in self.eos), len(row))] for row in rows], seconds
