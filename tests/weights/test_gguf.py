import gguf
import numpy
import pytest
import torch

from specrt.layers.rope import inverse_frequencies
from specrt.models.config import ModelConfig
from specrt.weights import open_checkpoint
from specrt.weights.gguf_format import GgufContainer
from tests.kit.compare import assert_bits, relative_error
from tests.kit.tiny import CONFIGS, random_tensors, write_gguf

# K types come in blocks of 256.
WIDE = {**CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
ROUNDING = {"F32": 0.0, "F16": 3e-4, "BF16": 3e-3, "Q8_0": 8e-3, "Q4_0": 0.12, "Q4_1": 0.11}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-linear", "mistral", "qwen2", "qwen3"])
def test_the_weights_and_the_config_are_those_of_the_folder(tmp_path, name):
    """Names, q/k permutation (of llama and mistral only) and metadata: F32 gives back every bit."""
    c = open_checkpoint(write_gguf(tmp_path / "m.gguf", name))
    want = ModelConfig.from_hf(CONFIGS[name])
    tensors = random_tensors(want)
    assert set(c.tensors.names()) == set(tensors) and c.form == "gguf"
    for key, tensor in tensors.items():
        assert_bits(c.tensors.get(key), tensor)
    same = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "windows", "attention_bias", "o_bias", "mlp_bias", "qk_norm",
            "rope_scaling", "tie_word_embeddings", "max_position_embeddings", "bos_token_id")
    assert {k: getattr(c.config, k) for k in same} == {k: getattr(want, k) for k in same}
    assert c.config.rms_norm_eps == pytest.approx(want.rms_norm_eps) and c.config.eos_token_ids == (2,)


@pytest.mark.parametrize("storage", ROUNDING)
def test_each_storage_is_near_the_unquantised_weights(tmp_path, storage):
    c = open_checkpoint(write_gguf(tmp_path / "m.gguf", WIDE, storage))
    for key, tensor in random_tensors(c.config).items():
        assert c.tensors.storage(key) == (storage if tensor.ndim == 2 else "F32")
        assert relative_error(c.tensors.get(key), tensor) <= (ROUNDING[storage] if tensor.ndim == 2 else 0.0)


def q4_k(raw):
    """One block of 256 by the format's definition: d, dmin, 8 six-bit scales and minima packed in 12 bytes, 128 bytes of nibbles."""
    d, dmin = numpy.frombuffer(raw[:4].tobytes(), numpy.float16).astype(numpy.float64)
    s, q = raw[4:16].astype(int), raw[16:].astype(int)
    out = []
    for j in range(8):
        scale, low = (s[j] & 63, s[j + 4] & 63) if j < 4 else ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
        nibbles = q[32 * (j // 2) : 32 * (j // 2) + 32] >> (4 * (j % 2)) & 15
        out.append(d * scale * nibbles - dmin * low)
    return numpy.concatenate(out)


def q6_k(raw):
    """One block of 256: 128 bytes of low nibbles, 64 of high bit pairs, 16 signed scales, d."""
    low, high, scale = raw[:128].astype(int), raw[128:192].astype(int), raw[192:208].view(numpy.int8).astype(float)
    d = float(numpy.frombuffer(raw[208:].tobytes(), numpy.float16)[0])
    out = numpy.empty(256)
    for half in range(2):
        for i in range(32):
            ql, qh = low[64 * half :], high[32 * half + i]
            for part, nibble in enumerate((ql[i] & 15, ql[i + 32] & 15, ql[i] >> 4, ql[i + 32] >> 4)):
                at = 128 * half + 32 * part + i
                out[at] = d * scale[at // 16] * ((nibble | (qh >> 2 * part & 3) << 4) - 32)
    return out


@pytest.mark.parametrize("storage, block", [("Q4_K", q4_k), ("Q6_K", q6_k)])
def test_k_types_by_their_definition(tmp_path, storage, block):
    path = write_gguf(tmp_path / "m.gguf", WIDE, storage)
    name = "blk.0.ffn_up.weight"
    raw = next(t for t in gguf.GGUFReader(path).tensors if t.name == name).data
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[storage]][1]
    want = torch.from_numpy(numpy.stack([block(b) for b in numpy.asarray(raw).reshape(-1, size)])).reshape(256, 256)
    assert relative_error(open_checkpoint(path).tensors.get("model.layers.0.mlp.up_proj.weight"), want) < 1e-6 and want.abs().max() > 0


def test_the_container_agrees_with_the_gguf_package(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen3", extra__list=[1, 2, 3], extra__flag=True, extra__text="né")
    ours, theirs = GgufContainer(path), gguf.GGUFReader(path)
    assert ours.metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {n: (t.shape, t.start, t.size) for n, t in ours.tensors.items()} == {
        t.name: (tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors}


def test_rope_factors_are_llama3_scaling(tmp_path):
    """llama.cpp stores Llama 3.1's scaling as divisors of the frequencies."""
    config = ModelConfig.from_hf(CONFIGS["llama3"])
    scaled, plain = inverse_frequencies(64, 500000.0, config.rope_scaling), inverse_frequencies(64, 500000.0, None)
    c = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama3", rope_factors=plain / scaled))
    assert c.config.rope_scaling["rope_type"] == "factors"
    got = inverse_frequencies(64, c.config.rope_theta, c.config.rope_scaling)
    assert relative_error(got, scaled) < 1e-6 and relative_error(got, plain) > 1e-4
    with pytest.raises(ValueError, match="rope_freqs.weight' must hold 32 finite numbers > 0, got 16"):
        open_checkpoint(write_gguf(tmp_path / "n.gguf", "llama3", rope_factors=torch.ones(16)))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("keep", [0.0, 0.00001, 0.001, 0.02, 0.3, 0.999])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write_gguf(tmp_path / "m.gguf", "llama")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="m.gguf is not a readable GGUF file"):
        open_checkpoint(path)


def test_a_damaged_header_never_crashes(tmp_path):
    """Bytes of the header overwritten at random: a ValueError, or a file that still says the same shapes."""
    path = write_gguf(tmp_path / "m.gguf", "llama")
    data = path.read_bytes()
    rng = numpy.random.default_rng(0)
    refused = 0
    for _ in range(150):
        spoiled = bytearray(data)
        for at in rng.integers(4, 9000, 2):
            spoiled[at] = rng.integers(0, 256)
        path.write_bytes(spoiled)
        try:
            open_checkpoint(path).tokenizer()
        except ValueError:
            refused += 1
    assert refused > 50


BAD = {
    "moe": ({"llama__expert_count": 8}, "llama.expert_count' = 8: mixtures of experts"),
    "rope scaling": ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type' = 'yarn' is not supported; supported: none, linear"),
    "rope dimensions": ({"llama__rope__dimension_count": 32}, "rope.dimension_count' = 32 must equal the head dimension 64"),
    "vocabulary": ({"llama__vocab_size": 301}, "llama.vocab_size' = 301, but token_embd.weight has 300 rows"),
    "split": ({"split__count": 4}, "one of 4 pieces of a split GGUF"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metadata_is_named(tmp_path, case):
    metadata, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", **metadata))


def rewrite(path, old, new):
    data = path.read_bytes()
    assert data.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize("old, new, message", [
    (b"attention.layer_norm_rms_epsilon", b"attention.layer_norm_rms_epsilom", "layer_norm_rms_epsilon' must be of type float, and it is missing"),
    (b"blk.1.attn_k.weight", b"blk.1.attn_z.weight", "'model.layers.1.self_attn.k_proj.weight' \\(and 1 are unexpected: 'blk.1.attn_z.weight'"),
    (b"GGUF\x03", b"GGUF\x01", "GGUF version 1 "), (b"GGUF", b"GGML", "begins with b'GGML'"),
    (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", "unknown architecture 'gemma'.*llama, qwen2, qwen3"),
    (b"llama.block_count\x04\0\0\0\x03\0\0\0", b"llama.block_count\x04\0\0\0\0\0\0\x40", "<= 4096, got 1073741824"),
    (b"llama.block_count\x04\0\0\0\x03", b"llama.block_count\x04\0\0\0\x00", "block_count' must be >= 1 and <= 4096, got 0")])
def test_a_changed_header_is_named(tmp_path, old, new, message):
    path = write_gguf(tmp_path / "m.gguf", "llama")
    rewrite(path, old, new)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_other_quantisations_are_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", WIDE, "Q5_0")
    with pytest.raises(ValueError, match="has quantisation Q5_0, which is not supported; supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K"):
        open_checkpoint(path)
