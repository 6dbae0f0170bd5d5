"""Tokens and logprobs are a function of (weights, prompt, sampling parameters, seed) alone: nothing else of design section 4's matrix changes a bit."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from specrt.models.config import ModelConfig
from specrt.ops import FP8
from tests.invariance.matrix import answers, assert_same, cases, coverage, make, register_replay
from tests.kit.heads import Shape, random_head
from tests.kit.medusa import medusa_tensors, write_medusa
from tests.kit.tiny import CONFIGS, random_tensors, tiny_vocab, write_folder, write_weights

# SmolLM2's layer (9 query heads, 3 KV heads of 64), few of them; and one with a sliding window and page-crossing lengths.
SMOL = {**CONFIGS["llama"], "hidden_size": 576, "intermediate_size": 256, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "num_hidden_layers": 2,
        "max_position_embeddings": 2048}
VOCAB = SMOL["vocab_size"]
LENGTHS = (1, 5, 16, 40, 70, 130, 65, 33)
TOKENS = 40
DTYPES = ["bfloat16", "float32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("target"), SMOL)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """The same model with scales for keys and values."""
    folder, c = write_folder(tmp_path_factory.mktemp("scaled"), SMOL), ModelConfig.from_hf(SMOL)
    scales = {f"model.layers.{i}.self_attn.{x}_scale": torch.tensor(0.01 * (i + 1) + 0.02 * (x == "v")) for i in range(c.num_layers) for x in "kv"}
    write_weights(folder, random_tensors(c) | scales)
    return folder


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """Another small model of the same tokenizer: accepted by luck only, so rejections are certain."""
    return write_folder(tmp_path_factory.mktemp("draft"), {**SMOL, "num_hidden_layers": 1}, seed=1)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Heads of random weights: at temperature 1 the shared noise has them accepted now and then."""
    folder = tmp_path_factory.mktemp("heads")
    medusa = write_medusa(folder / "target", medusa_tensors(hidden=576, vocab=VOCAB))
    return {"medusa": medusa, **{name: random_head(folder / name, s) for name, s in HEADS.items()}}


@functools.lru_cache(maxsize=None)
def reference(model, device, dtype, **settings):
    """Every request alone, without speculation."""
    batch = cases(len(LENGTHS), VOCAB, LENGTHS, TOKENS)
    with make(model, device=device, dtype=dtype, max_batch_size=1, **settings) as llm:
        return batch, answers(llm, batch, together=False)


EAGLE3_HEAD = Shape("eagle3", vocab=VOCAB, hidden=192, target_hidden=576, draft=200, own_embedding=True, layers=2, fc_norm=True, norm_output=True)
HEADS = {"eagle3": EAGLE3_HEAD, "window": replace(EAGLE3_HEAD, window=20), "eagle": Shape("eagle", vocab=VOCAB, hidden=576, target_hidden=576, fc_bias=True),
         "mtp": Shape("mtp", vocab=VOCAB, hidden=576, target_hidden=576, bias=True), "peagle": Shape("peagle", vocab=VOCAB, hidden=576, target_hidden=576, draft=200)}
STATIC = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [2, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0, 0]]
EAGLE3 = dict(method="eagle3", model="eagle3", eagle_aux_hidden_state_layer_ids=[0, 1, 2])
LAYERSKIP = dict(method="layerskip", exit_layer=1)
TREE = dict(num_steps=6, eagle_topk=3, num_draft_tokens=14)
VARIANTS = {
    "batch": (dict(), {}),
    "chunked-3": (dict(), dict(chunk=3)),
    "chunked-64": (dict(), dict(chunk=64)),
    "pages-16": (dict(), dict(page_size=16)),
    "pages-32": (dict(), dict(page_size=32)),
    "late": (dict(), dict(late=True)),
    "eager-at-once": (dict(), dict(late=False, enforce_eager=True)),
    "ngram-chain": (dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3, num_speculative_tokens=7), {}),
    "ngram-chain-late": (dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3, num_speculative_tokens=5), dict(late=True)),
    "ngram-tree-eager": (dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3, **TREE), dict(enforce_eager=True)),
    "ngram-tree": (dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3, **TREE), {}),
    "replay-chain": (dict(method="replay", num_speculative_tokens=9), {}),
    "replay-chain-chunked": (dict(method="replay", num_speculative_tokens=63), dict(chunk=7, page_size=16)),
    "replay-tree": (dict(method="replay", **TREE), {}),
    "replay-tree-64": (dict(method="replay", num_steps=20, eagle_topk=4, num_draft_tokens=64), dict(page_size=16)),
    "replay-tree-late": (dict(method="replay", **TREE), dict(late=True, page_size=16)),
    "draft-self-chain-late": (dict(method="draft_model", model="target", num_speculative_tokens=4), dict(late=True)),
    "draft-self-chain-eager": (dict(method="draft_model", model="target", num_speculative_tokens=4), dict(enforce_eager=True)),
    "draft-self-chain": (dict(method="draft_model", model="target", num_speculative_tokens=4), {}),
    "draft-self-tree": (dict(method="draft_model", model="target", num_steps=3, eagle_topk=3, num_draft_tokens=10), {}),
    "draft-other-chain": (dict(method="draft_model", model="draft", num_speculative_tokens=3), {}),
    "draft-other-tree": (dict(method="draft_model", model="draft", num_steps=3, eagle_topk=2, num_draft_tokens=6, draft_sample_method="greedy"), dict(page_size=32)),
    "eagle3-chain": (dict(**EAGLE3, num_speculative_tokens=4), {}),
    "eagle3-chain-late": (dict(**EAGLE3, num_speculative_tokens=3), dict(late=True, chunk=7, page_size=16)),
    "eagle3-tree": (dict(**EAGLE3, **TREE), {}),
    "eagle3-tree-64-eager": (dict(**EAGLE3, num_steps=8, eagle_topk=10, num_draft_tokens=64, quantization="fp8"), dict(enforce_eager=True, page_size=16)),
    "eagle3-window-chain-late": (dict(EAGLE3, model="window", num_speculative_tokens=4), dict(late=True, chunk=7, page_size=16)),
    "eagle3-window-tree": (dict(EAGLE3, model="window", **TREE), dict(page_size=32)),
    "eagle3-window-tree-64-eager": (dict(EAGLE3, model="window", num_steps=8, eagle_topk=10, num_draft_tokens=64), dict(enforce_eager=True, chunk=64)),
    "eagle-chain": (dict(method="eagle", model="eagle", num_speculative_tokens=4), dict(page_size=32)),
    "eagle-tree-late": (dict(method="eagle", model="eagle", **TREE), dict(late=True)),
    "eagle3-static-late": (dict(**EAGLE3, choices=STATIC), dict(late=True, page_size=16)),
    "draft-self-static": (dict(method="draft_model", model="target", choices=STATIC), {}),
    "eagle-static": (dict(method="eagle", model="eagle", choices=STATIC), {}),
    "peagle-static": (dict(EAGLE3, method="peagle", model="peagle", choices=STATIC), dict(page_size=32)),
    "mtp-static-late": (dict(method="mtp", model="mtp", choices=STATIC), dict(late=True)),
    "layerskip-chain-late": (dict(**LAYERSKIP, num_speculative_tokens=4), dict(late=True, chunk=7)),
    "layerskip-chain-eager": (dict(**LAYERSKIP, num_speculative_tokens=3, draft_sample_method="greedy"), dict(enforce_eager=True)),
    "layerskip-tree": (dict(**LAYERSKIP, **TREE), dict(page_size=16)),
    "layerskip-tree-64-late": (dict(**LAYERSKIP, num_steps=8, eagle_topk=10, num_draft_tokens=64), dict(late=True)),
    "layerskip-static": (dict(**LAYERSKIP, choices=STATIC), dict(chunk=64)),
    "medusa-static": (dict(method="medusa", model="medusa", choices=STATIC), {}),
    "peagle-chain": (dict(EAGLE3, method="peagle", model="peagle", num_speculative_tokens=4), dict(page_size=16)),
    "peagle-tree-late": (dict(EAGLE3, method="peagle", model="peagle", **TREE), dict(late=True, chunk=7)),
    "mtp-chain": (dict(method="mtp", model="mtp", num_speculative_tokens=1), {}),
    "mtp-tree-late": (dict(method="mtp", model="mtp", **TREE), dict(late=True, chunk=7, page_size=16)),
    "medusa-chain-late": (dict(method="medusa", model="medusa", num_speculative_tokens=3), dict(late=True, chunk=7)),
    "medusa-tree": (dict(method="medusa", model="medusa", num_steps=4, eagle_topk=5, num_draft_tokens=40), dict(page_size=16)),
}


@pytest.mark.filterwarnings("ignore:head .* the draft vocabulary", "ignore:head .* made for")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_changes_a_bit(monkeypatch, model, draft, heads, device, dtype, variant):
    batch, want = reference(model, device, dtype)
    spec, settings = VARIANTS[variant]
    spec = {**spec, **({"model": str({"target": model, "draft": draft, **heads}[spec["model"]])} if "model" in spec else {})}
    register_replay(monkeypatch, list(zip(batch, want)), VOCAB, "tree" if "num_steps" in spec else "chain")
    with make(model, device=device, dtype=dtype, max_batch_size=3, speculative_config=spec or None, **settings) as llm:
        assert_same(answers(llm, batch, together=True), want, variant)
        seen = coverage(llm)
    if spec:
        assert seen.drafted > 0
    if spec.get("method") == "replay":
        deepest = {"replay-chain": 9, "replay-chain-chunked": 30, "replay-tree": 4, "replay-tree-late": 4, "replay-tree-64": 5}[variant]
        assert len([n for n in seen.accepted_per_pos if n > 0]) >= deepest, seen.accepted_per_pos
        assert seen.accepted < seen.drafted
    if variant.startswith(("draft-self", "eagle", "peagle", "mtp", "medusa", "layerskip")):
        assert seen.accepted > 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drafter", [dict(method="replay"), LAYERSKIP], ids=["replay", "layerskip"])
def test_put_back_and_recomputed(monkeypatch, model, device, drafter, dtype, late):
    """Pages for about two requests: the third is put back and recomputed, in the middle of speculation."""
    batch, want = reference(model, device, dtype)
    register_replay(monkeypatch, list(zip(batch, want)), VOCAB, "tree")
    page = 2 * 2 * 3 * 16 * 64 * getattr(torch, dtype).itemsize  # k and v, layers, heads, positions, head dim
    with make(model, late=late, device=device, dtype=dtype, max_batch_size=4, page_size=16, kv_cache_memory=18 * page, speculative_config={**drafter, **TREE}) as llm:
        assert_same(answers(llm, batch, together=True), want, "put back")
        assert coverage(llm).put_back > 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_requests_of_every_kind_in_one_batch(monkeypatch, model, device, dtype, late):
    """Off, chain and tree by request, joining and leaving as others end."""
    batch, want = reference(model, device, dtype)
    register_replay(monkeypatch, list(zip(batch, want)), VOCAB, "tree")
    kinds = [False, None, {"method": "ngram"}, {"num_draft_tokens": 5}]
    mixed = [replace(c, params=replace(c.params, speculative=kinds[i % 4])) for i, c in enumerate(batch)]
    with make(model, late=late, device=device, dtype=dtype, max_batch_size=5, speculative_config=dict(method="replay", **TREE)) as llm:
        assert_same(answers(llm, mixed, together=True), want, "mixed")


@pytest.mark.filterwarnings("ignore:head .* the draft vocabulary")
@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("late", [False, True])
def test_a_head_among_others_put_back_and_recomputed(model, heads, device, late, kv):
    """Requests with the head's drafts, with others' and with none in one batch; pages for about two of them."""
    batch, want = reference(model, device, "bfloat16", kv_cache_dtype=kv)
    kinds = [None, False, {"num_draft_tokens": 5}, {"method": "ngram"}]
    mixed = [replace(c, params=replace(c.params, speculative=kinds[i % 4])) for i, c in enumerate(batch)]
    page = 2 * (1 if kv == "fp8" else 2) * 16 * (2 * 3 * 64 + 2 * 2 * 64)  # k and v, bytes, 16 positions: the target's layers, heads, head dim, and the head's
    spec = {**EAGLE3, **TREE, "model": str(heads["eagle3"])}
    with make(model, late=late, device=device, dtype="bfloat16", max_batch_size=4, page_size=16, kv_cache_dtype=kv, kv_cache_memory=13 * page, speculative_config=spec) as llm:
        assert llm.config.num_pages == 13
        assert_same(answers(llm, mixed, together=True), want, "mixed")
        assert coverage(llm).put_back > 0 and coverage(llm).accepted > 0


@pytest.mark.filterwarnings("ignore:head .* the draft vocabulary")
def test_a_heads_window_matters(model, tmp_path, device):
    """Else its rows of the matrix show nothing: the same weights without the window draft otherwise."""
    batch, seen = cases(4, VOCAB, (70, 130), TOKENS), []
    for s in (HEADS["window"], replace(HEADS["window"], window=4096)):
        with make(model, device=device, max_batch_size=4, speculative_config=dict(EAGLE3, model=str(random_head(tmp_path / str(s.window), s)), **TREE)) as llm:
            seen.append((answers(llm, batch, together=True), coverage(llm).accepted_per_pos))
    assert_same(seen[0][0], seen[1][0], "window")
    assert seen[0][1] != seen[1][1]


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_a_sliding_window_is_exact_too(monkeypatch, tmp_path, device, kv):
    config = {**CONFIGS["mistral"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 24, "max_position_embeddings": 2048}
    folder = write_folder(tmp_path / "window", config)
    batch = cases(4, config["vocab_size"], (3, 30, 75, 90), 30)
    with make(folder, device=device, kv_cache_dtype=kv, max_batch_size=1) as llm:
        want = answers(llm, batch, together=False)
    for shape, spec in (("chain", dict(num_speculative_tokens=8)), ("tree", TREE)):
        register_replay(monkeypatch, list(zip(batch, want)), config["vocab_size"], shape)
        with make(folder, device=device, kv_cache_dtype=kv, chunk=5, page_size=16, speculative_config=dict(method="replay", **spec)) as llm:
            assert_same(answers(llm, batch, together=True), want, shape)


@pytest.mark.parametrize("variant", ["batch", "chunked-3", "eager-at-once", "ngram-chain", "replay-chain-chunked", "replay-tree-64", "draft-self-tree", "layerskip-tree"])
def test_fp8_weights_are_exact_too(monkeypatch, model, device, variant):
    batch, want = reference(model, device, "bfloat16", quantization="fp8")
    spec, settings = VARIANTS[variant]
    spec = {**spec, **({"model": str(model)} if "model" in spec else {})}
    register_replay(monkeypatch, list(zip(batch, want)), VOCAB, "tree" if "num_steps" in spec else "chain")
    with make(model, device=device, quantization="fp8", max_batch_size=3, speculative_config=spec or None, **settings) as llm:
        assert_same(answers(llm, batch, together=True), want, variant)
        assert not spec or coverage(llm).drafted > 0


# Every drafter with keys and values of its own, every way a tree's rows and the prompt's come about.
FP8_KV = ["batch", "chunked-3", "pages-32", "eager-at-once", "ngram-chain-late", "ngram-tree", "replay-chain-chunked", "replay-tree-64", "replay-tree-late", "draft-self-chain-late",
          "draft-self-tree", "draft-other-tree", "eagle3-chain", "eagle3-chain-late", "eagle3-tree", "eagle3-tree-64-eager", "eagle3-window-tree", "eagle-tree-late", "layerskip-tree-64-late",
          "layerskip-static", "peagle-tree-late", "mtp-tree-late", "medusa-tree"]


@pytest.mark.filterwarnings("ignore:head .* the draft vocabulary", "ignore:head .* made for")
@pytest.mark.parametrize("dtype, variant", [*(("bfloat16", v) for v in FP8_KV), *(("float32", v) for v in ("chunked-3", "replay-tree-64", "eagle3-tree"))])
def test_fp8_keys_and_values_are_exact_too(monkeypatch, scaled, draft, heads, device, dtype, variant):
    batch, want = reference(scaled, device, dtype, kv_cache_dtype="fp8")
    spec, settings = VARIANTS[variant]
    spec = {**spec, **({"model": str({"target": scaled, "draft": draft, **heads}[spec["model"]])} if "model" in spec else {})}
    register_replay(monkeypatch, list(zip(batch, want)), VOCAB, "tree" if "num_steps" in spec else "chain")
    with make(scaled, device=device, dtype=dtype, kv_cache_dtype="fp8", max_batch_size=3, speculative_config=spec or None, **settings) as llm:
        rounds = llm._engine.round
        assert all(pool.k.dtype == FP8 for pool in [rounds.pool, *(d.pool for d in rounds.drafters.values() if hasattr(d, "pool"))])
        assert_same(answers(llm, batch, together=True), want, variant)
        seen = coverage(llm)
    assert not spec or seen.drafted > 0
    if variant.startswith(("replay", "draft-self", "eagle", "peagle", "mtp", "medusa", "layerskip")):
        assert seen.accepted > 0


def test_fp8_keys_and_values_and_their_scales_matter(model, scaled, device):
    """Else the test above shows nothing."""
    logprobs = [reference(folder, device, "bfloat16", kv_cache_dtype=kv)[1][5].logprobs for folder, kv in ((model, "auto"), (scaled, "auto"), (model, "fp8"), (scaled, "fp8"))]
    assert logprobs[0] == logprobs[1] and logprobs[1] != logprobs[2] != logprobs[3] != logprobs[1]


def test_prompt_logprobs_do_not_depend_on_chunks(model, device):
    batch = cases(3, VOCAB, (20, 70, 100), 4)
    found = []
    for chunk in (None, 9):
        with make(model, chunk=chunk, device=device) as llm:
            outs = llm.generate([c.prompt for c in batch], [replace(c.params, prompt_logprobs=2) for c in batch])
            found.append([o.prompt_logprobs for o in outs])
    assert found[0] == found[1] and len(found[0][1]) == 70


def test_the_tiny_vocabulary_fits():
    assert len(tiny_vocab()) <= VOCAB
