"""Rounds as CUDA graphs, eagerly, and read late: the same bits. On the CPU: eagerly, read at once or late."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from specrt import SamplingParams, ops
from specrt.config import EngineConfig
from specrt.draft import build
from specrt.draft.draft_model import DraftModelDrafter
from specrt.models.dense import DenseModel
from specrt.round.graph import MOST_GRAPHS, RoundGraphs
from specrt.round.run import Round
from specrt.round.setup import SlotSetup
from tests.kit.heads import Shape, random_head
from tests.kit.tiny import random_checkpoint

ROUNDS = 12
LOOKUP = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
SPECS = {
    "off": None,
    "chain": {**LOOKUP, "num_speculative_tokens": 7},
    "tree": {**LOOKUP, "num_steps": 4, "eagle_topk": 2, "num_draft_tokens": 8},
    "standard": {**LOOKUP, "num_speculative_tokens": 7, "rejection_sample_method": "standard"},
    "synthetic": {**LOOKUP, "num_speculative_tokens": 7, "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.5},
    "head": {"method": "eagle3", "model": "a head", "num_steps": 3, "eagle_topk": 3, "num_draft_tokens": 8, "eagle_aux_hidden_state_layer_ids": [0, 1, 3]},
    "layerskip": {"method": "layerskip", "exit_layer": 2, "num_steps": 3, "eagle_topk": 3, "num_draft_tokens": 8},
    "draft model": {"method": "draft_model", "model": "the target", "num_steps": 3, "eagle_topk": 3, "num_draft_tokens": 8},
}


@functools.lru_cache(maxsize=None)
def head_folder() -> str:
    return str(random_head(Path(tempfile.mkdtemp()), Shape(layers=2, fc_norm=True)))


def make_round(name: str, device: str, eager: bool) -> Round:
    checkpoint, spec = random_checkpoint("qwen3"), SPECS[name]
    if name == "head":
        spec = {**spec, "model": head_folder()}
    target = DenseModel.load(checkpoint, torch.bfloat16, device)
    config = EngineConfig.parse(device=device, max_batch_size=3, max_model_len=256, page_size=16, enforce_eager=eager, speculative_config=spec).with_pages(80)
    if name == "draft model":
        drafters = {"draft_model": DraftModelDrafter(target, 3, 3, 3, ops.NOISE_SHARED, keep_logits=False)}
    else:
        drafters = {method: build(c, target=target, tokenizer=None, device=device, dtype=torch.bfloat16) for method, c in config.drafters.items()}
    return Round(target, drafters, config)


def enter(r: Round, slot: int, spec: dict | None, longest: int = 200, **params) -> None:
    """A request with a repeating prompt, so that lookup drafts are found."""
    tokens = [5, 9, 13, 5, 9, 13, 5, 9, 13 + slot] * 3
    method = spec and spec["method"]
    r.admit(slot, SlotSetup(tokens, len(tokens), 3 + slot, SamplingParams(seed=3, max_tokens=100, **params), (), method, 7 if spec else 0,
                            spec.get("num_steps", 7) if spec else 0, longest))
    r.set_pages(slot, list(range(17 * slot, 17 * slot + 17)))
    r.prefill([(slot, 0, len(tokens) - 1)])
    r.activate(slot)


@dataclass
class Copied:
    """What a round said, kept."""

    values: dict[str, np.ndarray | None]

    def __eq__(self, other: Copied) -> bool:
        return all((value is None and other.values[name] is None) or np.array_equal(value, other.values[name]) for name, value in self.values.items())


def copied(result) -> Copied:
    """Only what was emitted: entries past path_len, and trees of slots without one, are whatever was there."""
    used = np.arange(result.emitted.shape[1])[None] < result.path_len[:, None]
    nodes = np.arange(result.emitted.shape[1])[None] < result.tree_size[:, None]
    cut = lambda array, mask: None if array is None else array[mask]  # noqa: E731
    return Copied({"path_len": result.path_len.copy(), "error": result.error.copy(), "tree_size": result.tree_size.copy(), "emitted": result.emitted[used],
                   "tree_depth": result.tree_depth[nodes], "chosen": cut(result.chosen, used),
                   "top_token": cut(result.top_token, used), "top_logprob": cut(result.top_logprob, used)})


def play(r: Round, spec: dict | None, late: bool) -> list[Copied]:
    """A script of requests that join, leave and follow each other in a slot, reading every round at once or when the next one is in flight."""
    found, pending = [], None

    def launch(rounds: int) -> None:
        nonlocal pending
        for _ in range(rounds):
            launched = r.launch()
            if pending is not None:
                found.append(copied(pending.read()))
            if late:
                pending = launched
            else:
                found.append(copied(launched.read()))

    enter(r, 0, spec, temperature=0.9, top_p=0.95, logprobs=2)
    launch(ROUNDS)
    enter(r, 1, None, logit_bias={5: 1.5}, repetition_penalty=1.2)
    enter(r, 2, spec, allowed_token_ids=range(4, 40))
    launch(ROUNDS)
    r.release(0)  # its slot is given away while a round may still be in flight
    enter(r, 0, spec)
    launch(ROUNDS)
    r.release(1)
    launch(ROUNDS)
    r.release(2)
    r.release(0)
    if pending is not None:
        found.append(copied(pending.read()))
    return found


@pytest.mark.parametrize("name", SPECS)
def test_graphs_and_late_reading_change_nothing(device, name):
    want = play(make_round(name, device, eager=True), SPECS[name], late=False)
    assert len(want) == 4 * ROUNDS and sum(int(w.values["path_len"].sum()) for w in want) > 8 * ROUNDS
    assert not any(w.values["error"].any() for w in want)
    for eager, late in ((True, True), (False, False), (False, True)):
        r = make_round(name, device, eager)
        got = play(r, SPECS[name], late)
        differing = [i for i, (g, w) in enumerate(zip(got, want, strict=True)) if g != w]
        assert not differing, f"eager={eager}, late={late}: rounds {differing} differ"
        captured = [graph for graph in r.graphs.graphs.values() if graph is not None]
        assert len(captured) == 0 if eager or device == "cpu" else len(captured) >= 3
        # Once more: nothing is left in the slots of those that were there.
        assert play(r, SPECS[name], late) == want


@pytest.mark.parametrize("name", ["off", "chain"])
def test_a_slot_stops_at_its_longest_length(device, name):
    """The host need not be there in time: further rounds leave the slot as it is, and others go on."""
    r, spec = make_round(name, device, eager=False), SPECS[name]
    enter(r, 0, spec, longest=27 + 5)
    enter(r, 1, spec, temperature=0.5)
    lengths, results = [], []
    for _ in range(20):
        pending = r.launch()
        lengths.append(r.state.seq_lens[0].clone())
        results.append(copied(pending.read()))
    emitted = [int(result.values["path_len"][0]) for result in results]
    assert 5 <= sum(emitted) < 5 + r.width and emitted[-1] == 0 and len({int(x) for x in lengths[-10:]}) == 1
    assert all(result.values["path_len"][1] > 0 for result in results) and int(r.state.active[0]) == 0
    assert not any(result.values["tree_size"][0] for result in results[-10:])


def test_masked_rounds_are_split(device):
    """The host decides a round's masks between its two graphs; without the decision it is one round like any other."""
    outputs = []
    for eager in (True, False):
        r = make_round("chain", device, eager)
        enter(r, 0, SPECS["chain"], token_mask=lambda path: [])
        enter(r, 1, SPECS["chain"], temperature=0.7)
        found = []

        def decide() -> None:
            tokens, parents = r.tree(0)
            assert len(tokens) == len(parents) and parents[0] == -1
            masks = np.zeros((len(tokens), r.state.vocab), dtype=bool)
            masks[:, 40:60] = True
            masks[:, 50 + len(found) % 3] = False
            r.set_node_masks(0, masks)

        for _ in range(ROUNDS):
            found.append(copied(r.launch(decide).read()))
        for i, result in enumerate(found):
            mine = result.values["emitted"][: result.values["path_len"][0]]
            assert len(mine) and all(40 <= t < 60 and t != 50 + i % 3 for t in mine)
        outputs.append(found)
    assert outputs[0] == outputs[1]


def test_graphs_are_kept_in_bounds_and_by_need():
    graphs = RoundGraphs(torch.device("cpu"), enabled=False)
    calls = []
    for key in (1, 1, 2):
        graphs.run(key, lambda: calls.append(key))
    assert calls == [1, 1, 2] and not graphs.graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_the_least_recently_used_graph_goes_first():
    graphs, x = RoundGraphs(torch.device("cuda"), enabled=True), torch.zeros(1, device="cuda")
    for key in range(MOST_GRAPHS + 3):
        for _ in range(2):
            graphs.run(key, lambda: x.add_(1))
        graphs.run(0, lambda: x.add_(1))
    assert len(graphs.graphs) == MOST_GRAPHS and 0 in graphs.graphs and 1 not in graphs.graphs
    assert int(x) == 3 * (MOST_GRAPHS + 3)
    graphs.graphs.clear()  # the pool ends with its last graph
    for _ in range(2):
        graphs.run("anew", lambda: x.mul_(0))
    assert int(x) == 0
