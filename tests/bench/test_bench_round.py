"""Rounds of bench_round with heads of random weights: on the CPU, a tiny shape, one round; what is measured is really drafted and accepted."""

from __future__ import annotations

import pytest
import torch

from bench.bench_round import ROWS, Bench, Case, round_bytes
from bench.heads import random_head
from bench.shapes import SHAPES
from specrt.models.config import ModelConfig
from specrt.models.dense import DenseModel
from specrt.ops import FP8
from specrt.weights.head_fit import fit
from tests.kit.tiny import CONFIGS, random_checkpoint

TINY = ModelConfig.from_hf({**CONFIGS["llama"], "num_hidden_layers": 8, "max_position_embeddings": 4096})


@pytest.fixture(scope="module")
def target():
    return DenseModel.load(random_checkpoint(TINY), torch.bfloat16, "cpu")


@pytest.mark.parametrize("case", [Case("tiny", 2, 30, 5, acceptance=3.2, head="eagle3"), Case("tiny", 1, 30, 20, True, 3.2, head="eagle3", head_quantization="fp8", topk=4),
                                  Case("tiny", 1, 30, 5, acceptance=3.2, head="peagle"), Case("tiny", 1, 30, 2, acceptance=1.8, head="mtp"), Case("tiny", 1, 30, 4, acceptance=2.5, head="eagle"),
                                  Case("tiny", 1, 30, 4, acceptance=2.5), Case("tiny", 2, 30)], ids=str)
def test_a_round(target, case):
    bench = Bench(case, target)
    bench.enter()
    accepted = []
    for _ in range(12):
        result = bench.round.launch().read()
        assert not result.error.any()
        accepted += result.path_len.tolist()
        assert case.nodes == 1 or bench.head is None or result.tree_size.max() == case.nodes
    assert abs(sum(accepted) / len(accepted) - case.acceptance) < 0.7
    assert bench.head is None or round_bytes(target, case, bench.head) > round_bytes(target, case)


def test_a_round_with_fp8_keys_and_values(target):
    narrow = DenseModel.load(random_checkpoint(TINY), torch.bfloat16, "cpu", kv_dtype=FP8)
    case = Case("tiny", 2, 30, 5, acceptance=3.2, head="eagle3", kv_cache_dtype="fp8")
    bench = Bench(case, narrow)
    bench.enter()
    assert bench.round.pool.k.dtype == bench.round.drafters["eagle3"].pool.k.dtype == FP8 and not bench.round.launch().read().error.any()
    c = TINY
    assert round_bytes(target, case) - round_bytes(narrow, case) == 2 * 30 * 2 * c.num_layers * c.num_kv_heads * c.head_dim


def test_a_longer_chain_reads_more_of_its_head_but_peagle(target):
    def more(method: str, nodes: int) -> int:
        case = Case("tiny", 1, 30, nodes, acceptance=2.0, head=method)
        return round_bytes(target, case, Bench(case, target).head) - round_bytes(target, case)

    assert more("eagle3", 5) > more("eagle3", 4) and more("peagle", 5) == more("peagle", 4)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.case.head])
def test_the_heads_of_the_rows_fit_their_targets(name):
    case = ROWS[name].case
    config = ModelConfig.from_hf(SHAPES[case.shape])
    assert fit(random_head(case.head, config, torch.device("cpu")), config, "random") == []
