"""Rounds in which lm_head chooses the tokens (RoundShape.logits is False) and rounds through logits: the same tokens and log-probabilities, whoever is in the batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from specrt import SamplingParams
from specrt.round.run import Round
from specrt.round.setup import SlotSetup
from tests.invariance.matrix import FILTERED, GREEDY, PENALISED, SAMPLED, Case, answers, cases, make, register_replay
from tests.kit.tiny import CONFIGS, write_folder

LLAMA = {**CONFIGS["llama"], "max_position_embeddings": 2048}
VOCAB = LLAMA["vocab_size"]
TREE = dict(num_steps=6, eagle_topk=3, num_draft_tokens=14)
SPECS = {"off": None, "replay-tree": dict(method="replay", **TREE), "ngram-chain": dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3, num_speculative_tokens=5)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("target"), LLAMA)


@pytest.fixture
def rounds(monkeypatch):
    """How many rounds went each way: Counter of RoundShape.logits."""
    seen, launch = Counter(), Round.launch

    def counted(self, decide=None):
        seen[self.shape().logits] += 1
        return launch(self, decide)

    monkeypatch.setattr(Round, "launch", counted)
    return seen


def plain(logprobs: int | None) -> list[Case]:
    """Greedy and sampled requests."""
    kinds = [GREEDY, SAMPLED, dict(temperature=0.6), dict(temperature=0.0, top_k=5, top_p=0.5, min_p=0.3)]  # filters mean nothing to the greedy
    batch = cases(6, VOCAB, (1, 16, 40, 70), 30)
    return [Case(c.prompt, SamplingParams(**kinds[i % 4], seed=c.params.seed, max_tokens=30, ignore_eos=True, logprobs=logprobs)) for i, c in enumerate(batch)]


def chosen(found) -> list[list[tuple[int, float]]]:
    return [[(token, logprobs[token]) for token, logprobs in zip(answer.token_ids, answer.logprobs)] for answer in found]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("spec", SPECS)
def test_both_ways_give_the_same_bits(monkeypatch, model, rounds, device, dtype, spec, late):
    with make(model, device=device, dtype=dtype, max_batch_size=1) as llm:
        want = answers(llm, plain(logprobs=3), together=False)
    assert rounds[True] and not rounds[False]
    rounds.clear()
    register_replay(monkeypatch, list(zip(plain(3), want)), VOCAB, "tree")
    with make(model, device=device, dtype=dtype, late=late, max_batch_size=3, speculative_config=SPECS[spec]) as llm:
        got = answers(llm, plain(logprobs=0), together=True)
        assert chosen(got) == chosen(want) and all(len(step) == 1 for answer in got for step in answer.logprobs)
        assert [a.token_ids for a in answers(llm, plain(logprobs=None), together=True)] == [a.token_ids for a in want]
    assert rounds[False] and not rounds[True]


@pytest.mark.parametrize("other", [FILTERED, PENALISED, dict(logprobs=2), dict(allowed_token_ids=range(5, 60)), dict(token_mask=lambda path: torch.arange(VOCAB) % 3 > 0)],
                         ids=["filtered", "penalised", "top-logprobs", "allowed", "masked"])
def test_a_batch_changes_ways_as_requests_come_and_go(model, rounds, device, other):
    """One short request that needs logits among others that do not: the batch goes through logits while it is there."""
    batch = plain(logprobs=0)
    with make(model, device=device, max_batch_size=1) as llm:
        want = answers(llm, batch, together=False)
        assert rounds[False] and not rounds[True]
        guest = Case([3, 4, 5], SamplingParams(**{"seed": 5, "max_tokens": 9, "ignore_eos": True, "logprobs": 0, **other}))
        guest_want = answers(llm, [guest], together=False)
    rounds.clear()
    with make(model, device=device, max_batch_size=3) as llm:
        got = answers(llm, [*batch[:3], guest, *batch[3:]], together=True)
    assert [*got[:3], *got[4:]] == want and got[3:4] == guest_want
    assert rounds[False] and (rounds[True] or "token_mask" in other)


@pytest.mark.parametrize("style, requests, logits", [(GREEDY, 2, False), (GREEDY, 3, True), (SAMPLED, 2, False), (SAMPLED, 3, True), (dict(SAMPLED, logprobs=0), 3, False)],
                         ids=["greedy", "greedy_many", "sampled", "sampled_many", "logprobs_many"])
def test_many_rows_go_through_logits(model, rounds, device, style, requests, logits):
    spec = dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3, num_steps=8, eagle_topk=4, num_draft_tokens=64)
    batch = [Case(c.prompt, SamplingParams(**style, seed=c.params.seed, max_tokens=30, ignore_eos=True)) for c in cases(requests, VOCAB, (16, 40), 30)]
    with make(model, device=device, max_batch_size=1) as llm:
        want = [out.token_ids for out in llm.generate([c.prompt for c in batch], [c.params for c in batch])]
    assert set(rounds) == {False}
    rounds.clear()
    with make(model, device=device, max_batch_size=requests, speculative_config=spec) as llm:
        assert [out.token_ids for out in llm.generate([c.prompt for c in batch], [c.params for c in batch])] == want
    assert rounds[logits] and (logits or not rounds[True])  # a request is 64 rows, and the last are fewer


def test_which_requests_need_their_logits():
    def needs(stop_ids=(), **params) -> bool:
        return SlotSetup([1, 2], 2, 0, SamplingParams(**params), stop_ids, None, 0, 0, 10).needs_logits

    without = [dict(), dict(temperature=1.0), dict(logprobs=0), dict(temperature=0.0, top_k=3, top_p=0.1, min_p=0.2), dict(prompt_logprobs=3), dict(min_tokens=5)]
    assert not any(needs(**params) for params in without)
    hot = dict(temperature=0.9)
    through = [dict(hot, top_k=3), dict(hot, top_p=0.9), dict(hot, min_p=0.1), dict(repetition_penalty=1.1), dict(presence_penalty=0.1), dict(frequency_penalty=0.1),
               dict(logit_bias={3: 1.0}), dict(allowed_token_ids=[3]), dict(token_mask=lambda path: []), dict(logprobs=1), dict(min_tokens=5, stop_ids=(2,))]
    assert all(needs(**params) for params in through)


@pytest.mark.parametrize("method, logprobs, logits", [("synthetic", None, False), ("synthetic", 0, True), ("standard", None, True)])
def test_other_verifiers(model, rounds, device, method, logprobs, logits):
    """A synthetic draft is emitted whatever its row chose, so how likely it was must be looked up; the ratio test looks at distributions."""
    spec = dict(method="ngram", num_speculative_tokens=3, rejection_sample_method=method, **(dict(synthetic_acceptance_length=2.0) if method == "synthetic" else {}))
    with make(model, device=device, max_batch_size=2, speculative_config=spec) as llm:
        llm.generate([[5, 6, 7, 5, 6, 7]], SamplingParams(max_tokens=12, ignore_eos=True, logprobs=logprobs, temperature=0.5, seed=1))
    assert set(rounds) == {logits}


def test_a_row_that_is_not_finite_ends_its_request(model, rounds, device):
    """One token's embedding is NaN: who has it in the prompt ends with an error, others go on."""
    batch = plain(logprobs=None)[:3]
    prompts, params = [c.prompt for c in batch], [c.params for c in batch]
    with make(model, device=device, max_batch_size=4) as llm:
        want = [out.token_ids for out in llm.generate(prompts, params)]
        bad = next(t for t in range(VOCAB) if not any(t in ids for ids in prompts + want))
        llm._engine.round.target.embedding[bad] = float("nan")
        outs = llm.generate([*prompts, [5, bad]], [*params, SamplingParams(max_tokens=5)])
    assert outs[3].finish_reason == "error" and "not finite" in outs[3].error and not outs[3].token_ids
    assert [out.token_ids for out in outs[:3]] == want
    assert rounds[False] and not rounds[True]
