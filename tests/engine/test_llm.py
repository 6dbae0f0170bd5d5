"""LLM on the pseudo-model: forms of prompts, samples, seeds, streams, and that nothing starts when anything is wrong."""

import gc

import pytest

from specrt import SamplingParams
from specrt import llm as llm_module
from specrt.llm import LLM
from tests.engine.fake import NGRAM, VOCAB, FakeRound, assert_idle, make_engine, reference


@pytest.fixture(params=[0, 1], ids=["read at once", "read late"])
def llm(monkeypatch, request):
    monkeypatch.setattr(FakeRound, "lookahead", request.param)
    monkeypatch.setattr(llm_module, "load_engine", lambda model, config: make_engine(max_batch_size=3))
    with LLM("fake") as made:
        yield made


def engine(llm: LLM):
    return llm._engine


def params(**kw) -> SamplingParams:
    return SamplingParams(**{"speculative": NGRAM, "seed": 1, "max_tokens": 12} | kw)


@pytest.mark.parametrize("prompts, tokens", [
    ("abc", [[1, 2, 3]]), ([4, 5], [[4, 5]]), (["abc", "b"], [[1, 2, 3], [2]]), ([[4, 5], "b", (6,)], [[4, 5], [2], [6]]), ([[4]], [[4]]), (["abc"], [[1, 2, 3]])])
def test_forms_of_prompts(llm, prompts, tokens):
    outputs = llm.generate(prompts, params())
    assert [o.prompt_token_ids for o in outputs] == tokens
    assert [o.token_ids for o in outputs] == [reference(1, t, 12) for t in tokens]
    assert_idle(engine(llm))


@pytest.mark.parametrize("messages, count", [([{"role": "user", "content": "ab"}], 1), ([[{"role": "user", "content": "ab"}], [{"role": "user", "content": "c"}]], 2)])
def test_chat(llm, messages, count):
    outputs = llm.generate(messages, params(), chat=True)
    assert len(outputs) == count and outputs[0].prompt_token_ids == [26, 1, 2]


def test_one_params_a_prompt(llm):
    outputs = llm.generate(["a", "b"], [params(max_tokens=3), params(max_tokens=5, seed=2)])
    assert [len(o.token_ids) for o in outputs] == [3, 5] and outputs[1].seed == 2
    assert len(llm.generate("a")[0].token_ids) == 64


def test_samples_are_independent_and_can_be_had_again(llm):
    (out,) = llm.generate("abc", params(n=5))
    assert len(out.samples) == 5 and out.samples[0] is out and out.seed == 1
    assert len({tuple(s.token_ids) for s in out.samples}) == 5
    for sample in out.samples:
        (again,) = llm.generate("abc", params(seed=sample.seed))
        assert again.token_ids == sample.token_ids and again.samples == [again]
    assert "samples" not in repr(out)


def test_a_drawn_seed_is_reported(llm):
    first, second = llm.generate(["abc", "abc"], params(seed=None))
    assert first.seed != second.seed and first.token_ids != second.token_ids
    assert llm.generate("abc", params(seed=first.seed))[0].token_ids == first.token_ids


@pytest.mark.parametrize("prompts, given, kw, words", [
    ([], None, {}, "prompts"), ("", None, {}, "empty"), ([[]], None, {}, "empty"), (None, None, {}, "prompts"), (5, None, {}, "prompts"), (["a", None], None, {}, r"prompts\[1\]"),
    (["a", [99]], None, {}, r"prompts\[1\]: .*99"), ([1, "a"], None, {}, "'a'"), ([[1], [2.5]], None, {}, "2.5"), ("a", {"temperature": 1}, {}, "params"), (["a"], [None], {}, "params"),
    (["a", "b"], [SamplingParams()], {}, "1 entries for 2 prompts"), ("a", None, {"chat": True}, "messages"), ("a", None, {"chat": 1}, "chat"), ([["a"], "b"], None, {}, "'a'"),
    (["a", "b"], [SamplingParams(), SamplingParams(logit_bias={VOCAB: 1})], {}, r"prompts\[1\]: logit_bias"), (["a", [1] * 256], None, {}, "max_model_len"),
    ([], None, {"chat": True}, "messages"), (["a"], None, {"chat": True}, "messages"), (b"a", None, {}, "prompts"),
])
def test_nothing_starts_when_anything_is_wrong(llm, prompts, given, kw, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(prompts, given, **kw)
    assert_idle(engine(llm))
    assert engine(llm).totals.prompt_tokens == 0


def test_stream_pieces_make_the_output(llm):
    (want,) = llm.generate("abc", params(max_tokens=40))
    stream = llm.stream("abc", params(max_tokens=40))
    pieces = list(stream)
    assert [t for p in pieces for t in p.token_ids] == want.token_ids and "".join(p.text for p in pieces) == want.text
    assert [d for p in pieces for d in p.drafted] == want.drafted and any(want.drafted)
    assert all(p.finish_reason is None and len(p.drafted) == len(p.token_ids) for p in pieces[:-1])
    assert pieces[-1].finish_reason == "length" and pieces[-1].output is stream.output and stream.output.token_ids == want.token_ids
    assert_idle(engine(llm))
    assert list(stream) == []


def test_closing_a_stream_frees_its_request(llm):
    for _ in range(10):
        stream = llm.stream("abc", params(max_tokens=200))
        next(stream)
        stream.close()
        assert_idle(engine(llm))
        assert list(stream) == []
    with llm.stream("abc", params(max_tokens=200)) as stream:
        for piece in stream:
            break
    assert_idle(engine(llm))
    for piece in llm.stream("abc", params(max_tokens=200)):  # dropped without close: freed by the next step of anyone
        break
    gc.collect()
    llm.generate("b", params(max_tokens=1))
    assert_idle(engine(llm))


def test_streams_interleave(llm):
    streams = [llm.stream([i + 1], params(max_tokens=30 + i, seed=i)) for i in range(5)]  # two more than there are slots
    tokens = [[] for _ in streams]
    open_streams = set(range(5))
    while open_streams:
        for i in sorted(open_streams):
            try:
                tokens[i] += next(streams[i]).token_ids
            except StopIteration:
                open_streams.remove(i)
    assert tokens == [reference(i, [i + 1], 30 + i) for i in range(5)]
    assert_idle(engine(llm))


def test_stream_takes_one_prompt_and_one_sample(llm):
    for prompt, given in ((["a", "b"], params()), ("a", params(n=2)), ("", params())):
        with pytest.raises(ValueError):
            llm.stream(prompt, given)
    assert_idle(engine(llm))


def test_a_failing_step_ends_open_streams_with_an_error(llm):
    stream = llm.stream("abc", params(max_tokens=100))
    next(stream)
    engine(llm).round.explode = True
    with pytest.raises(RuntimeError, match="device lost"):
        llm.generate("a", params())
    engine(llm).round.explode = False
    (last,) = list(stream)
    assert last.finish_reason == "error" and "device lost" in last.error and last.output.finish_reason == "error"
    assert len(llm.generate("a", params())[0].token_ids) == 12
    assert_idle(engine(llm))


def test_closed(llm):
    stream = llm.stream("abc", params())
    assert llm.metrics()["specrt:num_requests_waiting"] == 1
    llm.close()
    llm.close()
    for call in (lambda: llm.generate("a"), lambda: llm.stream("a"), lambda: next(stream), llm.metrics):
        with pytest.raises(RuntimeError, match="closed"):
            call()
