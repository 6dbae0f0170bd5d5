"""Every key of LLM and speculative_config: defaults, combinations, and refusals that name the key."""

import math

import pytest
import torch

from specrt.config import EngineConfig, SpeculativeConfig
from specrt.llm import LLM

DRAFT = {"method": "draft_model", "model": "some/draft"}
SKIP = {"method": "layerskip"}
NGRAM = {"method": "ngram"}
EAGLE3 = {"method": "eagle3", "model": "some/head"}


def parse(**given) -> SpeculativeConfig:
    return SpeculativeConfig.parse(given)


def test_chain_defaults():
    draft, ngram = parse(**DRAFT), parse(**NGRAM)
    assert (draft.num_speculative_tokens, draft.is_tree, draft.max_draft_tokens, draft.max_depth) == (4, False, 4, 4)
    assert (ngram.num_speculative_tokens, ngram.prompt_lookup_min, ngram.prompt_lookup_max) == (8, 2, 4)
    assert (draft.rejection_sample_method, draft.draft_sample_method, draft.draft_tensor_parallel_size, draft.quantization) == ("exact", "shared_noise", 1, None)
    assert parse(**DRAFT, num_speculative_tokens=None).num_speculative_tokens == 4, "None is as if the key were not there"


@pytest.mark.parametrize("given, want", [({"prompt_lookup_min": 2}, (2, 2)), ({"prompt_lookup_max": 3}, (3, 3)), ({"prompt_lookup_min": 2, "prompt_lookup_max": 7}, (2, 7))])
def test_lookup_bounds(given, want):
    config = parse(**NGRAM, **given)
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == want


@pytest.mark.parametrize("base, given, want", [
    (DRAFT, {"num_draft_tokens": 32}, (5, 4, 32)), (NGRAM, {"num_draft_tokens": 16}, (5, 4, 16)), (DRAFT, {"num_steps": 3}, (3, 4, 13)), (DRAFT, {"eagle_topk": 2}, (5, 2, 11)),
    (DRAFT, {"num_steps": 8, "eagle_topk": 10}, (8, 10, 64)), (DRAFT, {"num_steps": 8, "eagle_topk": 10, "num_draft_tokens": 60}, (8, 10, 60)),
    (DRAFT, {"num_steps": 6, "eagle_topk": 1}, (6, 1, 7)), (NGRAM, {"num_steps": 30, "eagle_topk": 2, "num_draft_tokens": 64}, (30, 2, 64))])
def test_trees(base, given, want):
    config = parse(**base, **given)
    assert config.is_tree and (config.num_steps, config.eagle_topk, config.num_draft_tokens) == want
    assert config.max_draft_tokens == want[2] - 1 and config.max_depth == min(want[0], want[2] - 1)


def test_heads():
    chain, tree = parse(**EAGLE3), parse(**EAGLE3, num_draft_tokens=60, num_steps=8, eagle_topk=10, quantization="fp8")
    assert (chain.num_speculative_tokens, chain.eagle_aux_hidden_state_layer_ids, chain.norm_output) == (4, None, None)
    assert (tree.max_draft_tokens, tree.max_depth, tree.quantization) == (59, 8, "fp8")
    given = parse(**EAGLE3, eagle_aux_hidden_state_layer_ids=[2, 15, 27], norm_output=False)
    assert (given.eagle_aux_hidden_state_layer_ids, given.norm_output) == ((2, 15, 27), False)
    assert parse(method="eagle", model="some/head").max_depth == 4


def test_static_trees():
    config = parse(**EAGLE3, choices=[[1], (0,), [0, 3], [0, 3, 0], [1, 0]])
    assert config.choices == ((0,), (0, 3), (0, 3, 0), (1,), (1, 0)) and config.is_tree
    assert (config.num_steps, config.eagle_topk, config.num_draft_tokens, config.beam_width, config.max_depth) == (3, 4, 6, 2, 3)
    wide = parse(**DRAFT, choices=[[i] for i in range(4)] + [[i, 0] for i in range(4)])
    assert (wide.eagle_topk, wide.beam_width, wide.num_steps) == (4, 4, 2) and parse(**DRAFT, choices=[[0]]).beam_width == 1
    assert parse(**EAGLE3, num_draft_tokens=32).beam_width == 4 and parse(**EAGLE3).beam_width == 1


@pytest.mark.parametrize("choices, words", [
    ([], "1 to 63 paths"), ("[[0]]", "1 to 63 paths"), ([[0], []], "1 to 63 paths"), ([[i] for i in range(64)], "1 to 63 paths"), ([0, 1], "1 to 63 paths"), ([[0], [0.5]], "choices"),
    ([[0], [-1]], "choices"), ([[0], [1, 0]], r"\[1\] for \[1, 0\]"), ([[0], [0]], "no path twice")])
def test_choices_that_are_no_tree(choices, words):
    with pytest.raises(ValueError, match=words):
        parse(**EAGLE3, choices=choices)


def test_choices_exclude_other_shapes():
    for given in (dict(num_speculative_tokens=3), dict(num_steps=2), dict(num_draft_tokens=8)):
        with pytest.raises(ValueError, match="choices .*exclude each other"):
            parse(**EAGLE3, choices=[[0]], **given)
    with pytest.raises(ValueError, match="no meaning for method 'ngram'"):
        parse(**NGRAM, choices=[[0]])
    with pytest.raises(ValueError, match="choices.*'standard'"):
        parse(**EAGLE3, choices=[[0], [1]], rejection_sample_method="standard")


def test_synthetic():
    config = parse(**DRAFT, rejection_sample_method="synthetic", synthetic_acceptance_length=3)
    assert config.synthetic_acceptance_length == 3.0
    assert parse(**DRAFT, num_draft_tokens=32, rejection_sample_method="synthetic", synthetic_acceptance_length=6.0).synthetic_acceptance_length == 6.0


def test_standard_takes_trees_that_are_not_reranked():
    assert parse(**DRAFT, num_steps=5, eagle_topk=4, rejection_sample_method="standard").num_draft_tokens == 21
    assert parse(**DRAFT, num_draft_tokens=21, rejection_sample_method="standard").num_draft_tokens == 21
    assert parse(**NGRAM, num_draft_tokens=16, rejection_sample_method="standard").num_draft_tokens == 16
    for given in ({"num_draft_tokens": 20}, {"num_steps": 8, "eagle_topk": 10}):
        with pytest.raises(ValueError, match="num_draft_tokens.*exact"):
            parse(**DRAFT, **given, rejection_sample_method="standard")


@pytest.mark.parametrize("key", ["num_speculative_tokens", "num_steps", "eagle_topk", "num_draft_tokens"])
@pytest.mark.parametrize("value", [0, -1, 65, 2.0, math.nan, True, "4", [4]])
def test_draft_sizes(key, value):
    with pytest.raises(ValueError, match=key):
        parse(**DRAFT, **{key: value})


@pytest.mark.parametrize("base, given, words", [
    ({}, {}, "'method'.*'ngram'"), ({}, {"method": "eagle9"}, "'eagle9'.*'ngram', 'draft_model'"), ({}, {"method": 3}, "method"), ({}, {"method": ["ngram"]}, "method"),
    (DRAFT, {"num_spec_tokens": 4}, "num_spec_tokens.*num_speculative_tokens"), ({}, {"method": "draft_model"}, "'model'"), ({}, {"method": "draft_model", "model": ""}, "'model'"),
    ({}, {"method": "draft_model", "model": 5}, "'model'"), (NGRAM, {"model": "x"}, "'model'"), (DRAFT, {"prompt_lookup_max": 3}, "prompt_lookup_max"),
    (NGRAM, {"prompt_lookup_min": 6, "prompt_lookup_max": 5}, "prompt_lookup_min"), (NGRAM, {"prompt_lookup_min": 0}, "prompt_lookup_min"),
    (NGRAM, {"prompt_lookup_max": True}, "prompt_lookup_max"), (NGRAM, {"prompt_lookup_max": 2.5}, "prompt_lookup_max"),
    (DRAFT, {"num_speculative_tokens": 4, "num_steps": 3}, "exclude"), (DRAFT, {"num_steps": 1, "eagle_topk": 4, "num_draft_tokens": 6}, "at most 5"),
    (DRAFT, {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 5}, "at most 4"), (NGRAM, {"num_steps": 2, "eagle_topk": 2, "num_draft_tokens": 8}, "at most 7"),
    (DRAFT, {"rejection_sample_method": "typical"}, "typical.*not available"), (DRAFT, {"rejection_sample_method": "strict"}, "rejection_sample_method.*'exact'"),
    (DRAFT, {"rejection_sample_method": True}, "rejection_sample_method"), (DRAFT, {"rejection_sample_method": "synthetic"}, "synthetic_acceptance_length"),
    (DRAFT, {"synthetic_acceptance_length": 2.0}, "synthetic_acceptance_length"), (DRAFT, {"draft_sample_method": "random"}, "draft_sample_method"),
    (NGRAM, {"draft_sample_method": "greedy"}, "draft_sample_method"), (DRAFT, {"quantization": "int8"}, "quantization"), (NGRAM, {"quantization": "fp8"}, "quantization"), (DRAFT, {"draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size"),
    (DRAFT, {"draft_tensor_parallel_size": True}, "draft_tensor_parallel_size"), ({}, {"method": "eagle3"}, "'model'.*EAGLE-3 head"), ({}, {"method": "eagle"}, "'model'.*EAGLE head"),
    (EAGLE3, {"norm_output": 1}, "norm_output"), (EAGLE3, {"eagle_aux_hidden_state_layer_ids": []}, "eagle_aux_hidden_state_layer_ids"),
    (EAGLE3, {"eagle_aux_hidden_state_layer_ids": [1, -2]}, "eagle_aux_hidden_state_layer_ids"), (EAGLE3, {"eagle_aux_hidden_state_layer_ids": "2"}, "eagle_aux_hidden_state_layer_ids"),
    (DRAFT, {"norm_output": True}, "norm_output.*belongs to method 'eagle3'"), (EAGLE3, {"mask_token_id": 5}, "mask_token_id.*belongs to method 'peagle'"),
    (DRAFT, {"exit_layer": 2}, "exit_layer.*belongs to method 'layerskip'"), (SKIP, {"exit_layer": 0}, "exit_layer"), (SKIP, {"exit_layer": True}, "exit_layer"),
    (SKIP, {"model": "x"}, "'model'.*own layers"), (SKIP, {"quantization": "fp8"}, "quantization.*own layers"),
    ({}, {"method": "peagle", "model": "x", "mask_token_id": -1}, "mask_token_id"), ({}, {"method": "peagle"}, "'model'.*P-EAGLE head"), (DRAFT, {"eagle_aux_hidden_state_layer_ids": [1]}, "belongs to method 'eagle3'")])
def test_refused(base, given, words):
    with pytest.raises(ValueError, match=words):
        parse(**base, **given)


@pytest.mark.parametrize("value", [0.5, 5.5, math.nan, math.inf, True, "3", -1])
def test_synthetic_length(value):
    with pytest.raises(ValueError, match="synthetic_acceptance_length"):
        parse(**DRAFT, rejection_sample_method="synthetic", synthetic_acceptance_length=value)


@pytest.mark.parametrize("given", ["ngram", [("method", "ngram")], 4, True])
def test_speculative_config_is_a_dict(given):
    with pytest.raises(ValueError, match="speculative_config"):
        SpeculativeConfig.parse(given)


def test_methods_come_from_the_registry(monkeypatch):
    from specrt.draft import DRAFTERS

    with pytest.raises(ValueError, match="'of_a_test'"):
        parse(method="of_a_test")
    monkeypatch.setitem(DRAFTERS, "of_a_test", lambda *_, **__: None)
    config = EngineConfig.parse(device="cpu", speculative_config={"method": "of_a_test", "num_draft_tokens": 40})
    assert config.width == 40 and set(config.drafters) == {"ngram", "of_a_test"}


@pytest.mark.parametrize("kw", [
    dict(device="gpu"), dict(device=0), dict(device=True), dict(dtype="float16"), dict(dtype=None), dict(dtype=torch.float32), dict(quantization="int8"),
    dict(kv_cache_dtype="fp8_e5m2"), dict(kv_cache_dtype="FP8"), dict(kv_cache_dtype=None), dict(max_batch_size=0), dict(max_batch_size=True), dict(max_batch_size=2.0), dict(max_batch_size=None),
    dict(max_batch_size=10**6), dict(max_model_len=1), dict(max_model_len="8k"), dict(max_model_len=math.nan), dict(kv_cache_memory=0), dict(kv_cache_memory=-1),
    dict(kv_cache_memory=1e9), dict(kv_cache_memory=True), dict(page_size=48), dict(page_size="64"), dict(page_size=64.0), dict(page_size=None), dict(enforce_eager=1),
    dict(enforce_eager="no"), dict(speculative_config="ngram")])
def test_engine_keys(kw):
    (key,) = kw
    with pytest.raises(ValueError, match=key):
        EngineConfig.parse(**kw)
    with pytest.raises(ValueError, match=key):  # before the model is looked for
        LLM("/no/such/model", **kw)


def test_device():
    available = torch.cuda.is_available()
    assert EngineConfig.parse().device == ("cuda" if available else "cpu") and EngineConfig.parse(device="cpu").device == "cpu"
    if not available:
        with pytest.raises(ValueError, match="device = 'cuda'.*'cpu'"):
            EngineConfig.parse(device="cuda")


def test_model_length():
    config = EngineConfig.parse(device="cpu")
    assert config.for_model(2048).max_model_len == 2048 and config.for_model(131072).max_model_len == 8192
    config = EngineConfig.parse(device="cpu", max_model_len=20000)
    assert config.for_model(131072).max_model_len == 20000
    with pytest.raises(ValueError, match="max_model_len.*2048"):
        config.for_model(2048)


def test_every_engine_can_look_up():
    off = EngineConfig.parse(device="cpu")
    assert off.width == 9 and set(off.drafters) == {"ngram"} and off.rejection_sample_method == "exact" and off.synthetic_acceptance_length is None
    draft = EngineConfig.parse(device="cpu", speculative_config=dict(DRAFT, rejection_sample_method="standard"))
    assert draft.width == 9 and set(draft.drafters) == {"ngram", "draft_model"} and draft.rejection_sample_method == "standard"
    assert EngineConfig.parse(device="cpu", speculative_config=dict(NGRAM, num_speculative_tokens=3)).width == 4
    assert EngineConfig.parse(device="cpu", speculative_config=dict(DRAFT, num_draft_tokens=60)).width == 60
