import pytest
import torch
import transformers

from specrt.models.config import ModelConfig
from specrt.models.dense import DenseModel
from specrt.weights import open_checkpoint
from tests.kit.compare import assert_bits, assert_close, relative_error
from tests.kit.forward import Sequence
from tests.kit.tiny import CONFIGS, random_checkpoint, write_folder, write_gguf

TOKENS = torch.randint(0, 300, (75,), generator=torch.Generator().manual_seed(1)).tolist()  # crosses pages of 16 and a tile of 64


def peer(folder, dtype=torch.float32):
    """transformers' own reading of the folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    assert model.config.dtype == dtype
    return model


def peer_outputs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), output_hidden_states=True)


def load(folder, dtype, device):
    return DenseModel.load(open_checkpoint(folder), dtype, device)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_are_those_of_transformers(device, name, tmp_path):
    folder = write_folder(tmp_path / "m", name)
    want = peer_outputs(peer(folder), TOKENS).logits[0]
    model = load(folder, torch.float32, device)
    assert_close(Sequence(model).prefill(TOKENS), want, 1e-4)
    assert_close(Sequence(model).decode(TOKENS), want, 1e-4)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3"])
def test_bfloat16_logits_are_near(device, name, tmp_path):
    folder = write_folder(tmp_path / "m", name)
    exact = peer_outputs(peer(folder), TOKENS).logits[0]
    got = Sequence(load(folder, torch.bfloat16, device)).prefill(TOKENS)
    theirs = relative_error(peer_outputs(peer(folder, torch.bfloat16), TOKENS).logits[0], exact)
    assert relative_error(got, exact) < max(0.03, 1.5 * theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2-window", "qwen3"])
def test_a_prompt_row_has_the_bits_of_a_decoded_row(device, name, dtype):
    """Whole prompt, chunks of odd sizes, one row at a time, other pages and page sizes: the same logits to the bit."""
    model = DenseModel.load(random_checkpoint(name), dtype, device)
    whole = Sequence(model).prefill(TOKENS)
    assert not torch.isnan(whole).any()
    assert_bits(Sequence(model, page_size=64).decode(TOKENS), whole)
    chunked, at = Sequence(model, page_size=32), 0
    for size in (1, 30, 3, 41):
        assert_bits(chunked.forward(TOKENS[at : at + size], at, prefill=True), whole[at : at + size])
        at += size
    mixed = Sequence(model)
    mixed.prefill(TOKENS[:70])
    assert_bits(mixed.forward(TOKENS[70:71], 70, prefill=False), whole[70:71])


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen3"])
def test_a_tree_row_has_the_bits_of_its_path_decoded(device, name):
    """Branches do not see each other, though their keys lie side by side across a page and a tile of 64."""
    model = DenseModel.load(random_checkpoint(name), torch.bfloat16, device)
    start, parents = 58, [-1, 0, 0, 1, 1, 2, 3, 6, 5, 8, 7, 9]
    nodes = [(7 * i + 3) % 300 for i in range(len(parents))]
    sequence = Sequence(model)
    sequence.prefill(TOKENS[:start])
    got = sequence.tree(nodes, parents, start)
    for leaf in (4, 10, 11):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        plain = Sequence(model).decode(TOKENS[:start] + [nodes[i] for i in path])
        assert_bits(got[path], plain[start:])


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_features_are_the_residual_stream_at_each_boundary(device, name, tmp_path):
    """As transformers' hidden_states, but for the last, which those give after the final norm."""
    folder = write_folder(tmp_path / "m", name)
    hidden = peer_outputs(peer(folder), TOKENS).hidden_states
    model = load(folder, torch.float32, device)
    features = {j: torch.full((len(TOKENS), 128), float("nan"), device=device) for j in range(4)}
    plain = Sequence(model).prefill(TOKENS)
    assert_bits(Sequence(model).prefill(TOKENS, features), plain)
    for j in range(3):
        assert_close(features[j], hidden[j][0], 1e-4)
    last = features[3].double()
    normed = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-5) * model.norm.double()
    assert_close(normed, hidden[3][0], 1e-4)
    some = {2: torch.empty(len(TOKENS), 128, device=device)}
    Sequence(model).prefill(TOKENS, some)
    assert_bits(some[2], features[2])


@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_same_model(device, name, tmp_path):
    """The q/k permutation of llama.cpp's files undone, where there is one."""
    config = {**CONFIGS[name], "rope_theta": 10000.0}
    a = DenseModel.load(random_checkpoint(ModelConfig.from_hf(config)), torch.float32, device)
    b = DenseModel.load(open_checkpoint(write_gguf(tmp_path / "m.gguf", config)), torch.float32, device)
    assert_close(Sequence(b).prefill(TOKENS), Sequence(a).prefill(TOKENS), 1e-5)  # eps is stored as float32


def test_quantised_weights_stay_near(device, tmp_path):
    a = DenseModel.load(random_checkpoint("qwen2"), torch.float32, device)
    b = DenseModel.load(open_checkpoint(write_gguf(tmp_path / "m.gguf", "qwen2", "Q8_0")), torch.float32, device)
    assert 1e-5 < relative_error(Sequence(b).prefill(TOKENS), Sequence(a).prefill(TOKENS)) < 0.05


def test_weights_are_rounded_once_from_what_the_file_holds(tmp_path):
    model = load(write_gguf(tmp_path / "m.gguf", "qwen2", "Q4_1"), torch.bfloat16, "cpu")
    source = open_checkpoint(tmp_path / "m.gguf").tensors
    assert_bits(model.embedding, source.get("model.embed_tokens.weight").bfloat16())
    assert source.get("model.embed_tokens.weight").bfloat16().float().ne(source.get("model.embed_tokens.weight")).any()


def test_facts_for_the_pool(device):
    model = DenseModel.load(random_checkpoint("qwen3"), torch.bfloat16, device)
    assert (model.num_layers, model.kv_heads, model.head_dim, model.dtype, model.device.type) == (3, 2, 64, torch.bfloat16, device)


def test_scratch_is_bounded_and_the_dtype_checked(device):
    model = DenseModel.load(random_checkpoint("llama"), torch.float32, device)
    assert model.make_scratch(8).view(3).qkv.shape == (3, 3 * 128)
    with pytest.raises(ValueError, match="a batch of 9 rows does not fit buffers made for 8"):
        model.make_scratch(8).view(9)
    with pytest.raises(ValueError, match="dtype must be torch.bfloat16 or torch.float32, got torch.float16"):
        DenseModel.load(random_checkpoint("llama"), torch.float16, device)


def test_a_shape_without_kernels_is_refused_before_anything_is_read():
    config = ModelConfig.from_hf({**CONFIGS["llama"], "head_dim": 72})
    with pytest.raises(ValueError, match="head_dim = 72 is not supported"):
        DenseModel.load(random_checkpoint(config), torch.float32, "cpu")
    with pytest.raises(ValueError, match="head_dim = 72 is not supported on CUDA; supported: 64, 96, 128"):
        DenseModel.load(random_checkpoint(config), torch.float32, "cuda")
