"""Every key of SamplingParams: what is accepted, and that everything else is refused by name."""

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from specrt.sampling_params import SamplingParams

NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
COUNTS = ("top_k", "min_tokens", "max_tokens", "seed", "n", "logprobs", "prompt_logprobs")


def test_defaults():
    p = SamplingParams()
    assert (p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)
    assert (p.logit_bias, p.allowed_token_ids, p.token_mask, p.seed, p.logprobs, p.prompt_logprobs, p.speculative) == (None,) * 7
    assert (p.min_tokens, p.max_tokens, p.ignore_eos, p.stop, p.stop_token_ids, p.n) == (0, 64, False, (), (), 1)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "0.5", None, [1.0], 1j, -3.0, 1e30])
def test_numbers(key, value):
    with pytest.raises(ValueError, match=key):
        SamplingParams(**{key: value})


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", [True, 1.0, math.nan, "1", [1], 2**64, -(2**64)])
def test_counts(key, value):
    with pytest.raises(ValueError, match=key):
        SamplingParams(**{key: value})


@pytest.mark.parametrize("kw", [
    dict(temperature=1e-5), dict(top_p=0), dict(top_p=1.01), dict(min_p=1.01), dict(min_p=-0.1), dict(repetition_penalty=0), dict(presence_penalty=2.1), dict(top_k=-1),
    dict(frequency_penalty=-2.1), dict(max_tokens=0), dict(max_tokens=None), dict(min_tokens=-1), dict(min_tokens=65), dict(n=0), dict(n=None), dict(logprobs=-1), dict(prompt_logprobs=-1),
    dict(logprobs=True), dict(ignore_eos=1), dict(ignore_eos=None), dict(seed=2**63), dict(seed=-(2**63) - 1),
    dict(logit_bias=[1]), dict(logit_bias={"1": 1.0}), dict(logit_bias={-1: 1.0}), dict(logit_bias={True: 1.0}), dict(logit_bias={1: math.nan}), dict(logit_bias={1: math.inf}),
    dict(logit_bias={1: "1"}), dict(allowed_token_ids=[]), dict(allowed_token_ids=5), dict(allowed_token_ids=[1.0]), dict(allowed_token_ids=[-1]), dict(allowed_token_ids="12"),
    dict(token_mask=[True]), dict(token_mask="even"), dict(stop=""), dict(stop=["a", ""]), dict(stop=5), dict(stop=[5]), dict(stop=b"a"), dict(stop_token_ids=5),
    dict(stop_token_ids=[True]), dict(stop_token_ids=["a"]), dict(stop_token_ids=[-1]), dict(speculative=True), dict(speculative={}), dict(speculative="ngram"), dict(speculative=1),
    dict(speculative={"k": 1}), dict(speculative={"method": 5}), dict(speculative={"num_speculative_tokens": 0}), dict(speculative={"num_speculative_tokens": 64}),
    dict(speculative={"num_draft_tokens": 1}), dict(speculative={"num_draft_tokens": 65}), dict(speculative={"num_steps": True}), dict(speculative={"eagle_topk": 1.5}),
    dict(speculative={"num_speculative_tokens": 4, "num_steps": 2}), dict(speculative={"model": "x"})])
def test_refused(kw):
    (key,) = kw
    with pytest.raises(ValueError, match=key):
        SamplingParams(**kw)


def test_an_unknown_key_is_a_value_error():
    with pytest.raises(ValueError, match="'temprature'.*temperature"):
        SamplingParams(temprature=1.0)


def test_accepted_and_normalised():
    mask = lambda path: [True]  # noqa: E731
    p = SamplingParams(temperature=1, top_k=np.int64(5), top_p=np.float32(0.5), min_p=1, logit_bias={np.int32(3): -5}, allowed_token_ids=(9, 3, 3), token_mask=mask,
                       stop="x", stop_token_ids={4, 2}, seed=-(2**63), speculative={"method": "ngram", "num_speculative_tokens": np.int64(3)})
    assert (p.temperature, p.top_k, p.top_p, p.min_p) == (1.0, 5, 0.5, 1.0) and type(p.temperature) is float and type(p.top_k) is int
    assert p.logit_bias == {3: -5.0} and p.allowed_token_ids == (3, 9) and p.token_mask is mask and p.stop == ("x",) and p.stop_token_ids == (2, 4)
    assert p.speculative == {"method": "ngram", "num_speculative_tokens": 3} and SamplingParams(speculative=False).speculative is False
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b") and SamplingParams(stop=[]).stop == ()
    assert SamplingParams(top_p=1e-30).top_p == 1e-6


def test_immutable_and_replaceable():
    p = SamplingParams(stop=["a"], logit_bias={1: 2.0}, allowed_token_ids=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.temperature = 1.0
    assert dataclasses.replace(p, seed=3) == SamplingParams(stop=["a"], logit_bias={1: 2.0}, allowed_token_ids=[1], seed=3)
    with pytest.raises(ValueError, match="temperature"):
        dataclasses.replace(p, temperature=-1)


def test_what_it_holds_does_not_change_either():
    bias, wish = {1: 2.0}, {"method": "ngram", "num_steps": 2}
    p = SamplingParams(logit_bias=bias, speculative=wish)
    bias[1], wish["method"] = "x", 5
    for held, key, before in ((p.logit_bias, 1, {1: 2.0}), (p.speculative, "method", {"method": "ngram", "num_steps": 2})):
        for change in (lambda d: d.update({key: 0}), lambda d: d.pop(key), lambda d: d.popitem(), lambda d: d.clear(), lambda d: d.setdefault("new", 1),
                       lambda d: d.__setitem__(key, 0), lambda d: d.__delitem__(key), lambda d: d.__ior__({key: 0})):
            with pytest.raises(TypeError, match="do not change"):
                change(held)
        assert held == before


def test_equal_ones_have_one_hash_and_copies_are_equal():
    given = dict(logit_bias={1: 2.0, 5: -1.0}, speculative={"method": "ngram", "num_steps": 2}, stop=["a"], allowed_token_ids=[5, 1], seed=3)
    p, q = SamplingParams(**given), SamplingParams(**{**given, "logit_bias": {5: -1, 1: 2}})
    assert p == q and hash(p) == hash(q) and {p: 1}[q] == 1 and p != dataclasses.replace(p, logit_bias={1: 2.0})
    for other in (copy.copy(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p)), dataclasses.replace(p), SamplingParams(**dataclasses.asdict(p))):
        assert other == p and hash(other) == hash(p) and type(other.logit_bias) is type(p.logit_bias)
        with pytest.raises(TypeError):
            other.logit_bias[1] = 0.0
    assert json.loads(json.dumps(p.speculative)) == given["speculative"] and repr(p.logit_bias) == "{1: 2.0, 5: -1.0}"


def test_vocabulary():
    for kw in (dict(logit_bias={10: 1.0}), dict(allowed_token_ids=[1, 10]), dict(stop_token_ids=[10])):
        SamplingParams(**kw).check_vocabulary(11)
        with pytest.raises(ValueError, match=f"{next(iter(kw))}.*10.*0 to 9"):
            SamplingParams(**kw).check_vocabulary(10)


def test_needs_neither_torch_nor_the_extension():
    code = "import sys; from specrt import SamplingParams; SamplingParams(); import specrt.sampling_params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
