"""A round has no host sync and no allocation that a CUDA graph could not hold: captured once and replayed, it gives the bits of the eager rounds."""

from __future__ import annotations

import pytest
import torch

from specrt import SamplingParams
from specrt.config import EngineConfig
from specrt.draft import build
from specrt.models.dense import DenseModel
from specrt.round.run import Round
from specrt.round.setup import SlotSetup
from tests.kit.tiny import random_checkpoint

ROUNDS = 12


def make_round(spec: dict) -> Round:
    checkpoint = random_checkpoint("qwen3")
    target = DenseModel.load(checkpoint, torch.bfloat16, "cuda")
    config = EngineConfig.parse(device="cuda", max_batch_size=2, max_model_len=256, page_size=16, speculative_config=spec).with_pages(64)
    drafters = {name: build(c, target=target, tokenizer=checkpoint.tokenizer(), device="cuda", dtype=torch.bfloat16) for name, c in config.drafters.items()}
    return Round(target, drafters, config)


def enter(r: Round) -> None:
    """Two requests with a repeating prompt, so that lookup drafts are found; one greedy, one sampled."""
    for slot, temperature in enumerate((0.0, 0.9)):
        tokens = [5, 9, 13, 5, 9, 13, 5, 9, 13 + slot] * 3
        params = SamplingParams(temperature=temperature, top_p=0.95, seed=3, max_tokens=100)
        r.admit(slot, SlotSetup(tokens, len(tokens), 3 + slot, params, (), "ngram", 7, 7))
        r.set_pages(slot, list(range(20 * slot, 20 * slot + 20)))
        r.prefill([(slot, 0, len(tokens) - 1)])
        r.activate(slot)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("spec", [{"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 7},
                                  {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_steps": 4, "eagle_topk": 2, "num_draft_tokens": 8}])
def test_a_captured_round_gives_the_bits_of_an_eager_one(spec):
    r = make_round(spec)
    enter(r)
    eager = []
    for _ in range(ROUNDS):
        r.propose()
        r.verify()
        eager.append(r.state.readback.clone())
    for slot in (0, 1):
        r.release(slot)
    enter(r)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        r.propose()
        r.verify()
    for want in eager:  # the capture itself ran nothing
        graph.replay()
        assert torch.equal(r.state.readback, want)
    assert int(r.state.seq_lens.sum()) > 2 * 26 + ROUNDS  # something was emitted
