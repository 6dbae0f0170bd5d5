"""The exactness matrix: the same requests, generated in many ways, must give the same tokens and the same logprobs, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

import specrt.llm
from specrt import LLM, SamplingParams
from specrt.draft import DRAFTERS
from tests.kit.replay import ReplayDrafter

GREEDY = dict(temperature=0.0)
SAMPLED = dict(temperature=1.0)
FILTERED = dict(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01)
PENALISED = dict(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, logit_bias={5: 2.0, 9: -3.0}, min_tokens=6)
STYLES = [GREEDY, SAMPLED, FILTERED, PENALISED]


@dataclass
class Case:
    prompt: list[int]
    params: SamplingParams


@dataclass
class Answer:
    token_ids: list[int]
    logprobs: list[dict[int, float]]


@dataclass
class Coverage:
    """What a variant did, so that a test can assert that it tested something."""

    accepted_per_pos: list[int]
    drafted: int
    accepted: int
    put_back: int


def cases(count: int, vocab: int, lengths: tuple[int, ...], max_tokens: int, seed: int = 0) -> list[Case]:
    """Random prompts with repetitions (so that lookup drafts find something), every sampling style in turn."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        length = lengths[i % len(lengths)]
        phrase = [rng.randrange(vocab) for _ in range(max(1, length // 3))]
        prompt = (phrase * 4)[: length - 1] + [rng.randrange(vocab)] if length > 1 else [rng.randrange(vocab)]
        out.append(Case(prompt, SamplingParams(**STYLES[i % len(STYLES)], seed=1000 + i, max_tokens=max_tokens, ignore_eos=True, logprobs=3)))
    return out


def make(model, chunk: int | None = None, late: bool | None = None, **settings) -> LLM:
    """An LLM with every page poisoned. Not users' settings, for they must not matter: ``chunk``, prompt rows a step; ``late``, whether a round is read when the next
    one is already in flight (None: as the device does)."""
    load = specrt.llm.load_engine
    if chunk is not None:
        specrt.llm.load_engine = lambda model, config: load(model, replace(config, prefill_chunk=chunk))
    try:
        llm = LLM(model, **settings)
    finally:
        specrt.llm.load_engine = load
    poison(llm)
    if late is not None:
        llm._engine.round.lookahead = int(late)
    return llm


def answers(llm: LLM, batch: list[Case], together: bool) -> list[Answer]:
    if together:
        outs = llm.generate([c.prompt for c in batch], [c.params for c in batch])
    else:
        outs = [llm.generate(c.prompt, c.params)[0] for c in batch]
    for out in outs:
        assert out.finish_reason == "length", (out.finish_reason, out.error)
    return [Answer(o.token_ids, o.logprobs) for o in outs]


def coverage(llm: LLM) -> Coverage:
    m = llm.metrics()
    spec = "specrt:spec_decode_num_"
    return Coverage(list(m[spec + "accepted_tokens_per_pos_total"].values()), m[spec + "draft_tokens_total"], m[spec + "accepted_tokens_total"],
                    m["specrt:num_preemptions_total"])


def register_replay(monkeypatch, references: list[tuple[Case, Answer]], vocab: int, shape: str) -> None:
    """Makes the method "replay" known, with these continuations."""

    def factory(config, **_):
        drafter = ReplayDrafter(shape, vocab)
        for case, answer in references:
            drafter.remember(case.params.seed, case.prompt, answer.token_ids)
        return drafter

    monkeypatch.setitem(DRAFTERS, "replay", factory)


def poison(llm: LLM) -> None:
    """Fills every page with NaN, and fills pages again when they are freed: stale or unwritten keys and values must not matter."""
    engine = llm._engine
    rounds, allocator = engine.round, engine.scheduler.allocator
    pools = [rounds.pool] + [d.pool for d in rounds.drafters.values() if hasattr(d, "pool")]
    stored = [x.view(torch.uint8) for pool in pools for x in (pool.k, pool.v)]  # 0xff is NaN in every dtype of a pool
    for bytes_ in stored:
        bytes_.fill_(0xFF)
    free = allocator.free

    def free_and_poison(pages):
        index = torch.tensor(list(pages), dtype=torch.int64, device=rounds.pool.k.device)
        for bytes_ in stored:
            bytes_[:, index] = 0xFF
        free(pages)

    allocator.free = free_and_poison


def assert_same(got: list[Answer], want: list[Answer], what: str) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.token_ids == w.token_ids, f"{what}: request {i} differs from token {next(j for j, (a, b) in enumerate(zip(g.token_ids, w.token_ids)) if a != b)} on"
        assert g.logprobs == w.logprobs, f"{what}: request {i}: equal tokens, differing logprobs"
