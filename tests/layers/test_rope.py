import math

import pytest
import torch

from specrt.layers.rope import inverse_frequencies, rope_tables
from tests.kit.compare import assert_close, relative_error

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def by_definition(head_dim, theta, scaling):
    """Llama 3.1's rule, one frequency at a time in float64."""
    out = []
    for i in range(head_dim // 2):
        f = theta ** (-2 * i / head_dim)
        wave, old = 2 * math.pi / f, scaling["original_max_position_embeddings"]
        if wave > old / scaling["low_freq_factor"]:
            f /= scaling["factor"]
        elif wave > old / scaling["high_freq_factor"]:
            s = (old / wave - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            f = (1 - s) * f / scaling["factor"] + s * f
        out.append(f)
    return torch.tensor(out, dtype=torch.float64)


def test_frequencies():
    plain = torch.tensor([10000.0 ** (-2 * i / 96) for i in range(48)], dtype=torch.float64)
    assert_close(inverse_frequencies(96, 10000.0, None), plain, 1e-6)
    assert_close(inverse_frequencies(96, 10000.0, {"rope_type": "linear", "factor": 4.0}), plain / 4, 1e-6)
    want = by_definition(128, 500000.0, LLAMA3)
    got = inverse_frequencies(128, 500000.0, LLAMA3)
    assert (got.double() / want - 1).abs().max() < 1e-5 and (inverse_frequencies(128, 500000.0, None).double() / want - 1).abs().max() > 1


def test_tables(device):
    cos, sin = rope_tables(64, 10000.0, None, 300, device)
    assert cos.shape == sin.shape == (300, 32) and cos.dtype == torch.float32 and cos.device.type == device
    angle = torch.arange(300, dtype=torch.float64)[:, None] * inverse_frequencies(64, 10000.0, None).double()
    assert relative_error(cos, angle.cos()) < 1e-5 and relative_error(sin, angle.sin()) < 1e-5


@pytest.mark.parametrize("head_dim", [16, 48, 64, 96, 128])
def test_a_position_has_its_bits_in_a_table_of_any_length(head_dim, device):
    long = rope_tables(head_dim, 500000.0, LLAMA3, 9000, device)
    for positions in (*range(1, 70), 192, 257, 2047, 2049, 8320):
        for whole, table in zip(long, rope_tables(head_dim, 500000.0, LLAMA3, positions, device)):
            assert torch.equal(table, whole[:positions])


def test_an_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="'yarn' is not supported"):
        inverse_frequencies(64, 10000.0, {"rope_type": "yarn"})
