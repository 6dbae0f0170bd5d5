"""The engine on a pseudo-model: outputs do not depend on speculation, batch, chunks or put-backs; ends, errors and statistics are right."""

import time

import numpy as np
import pytest

from specrt.config import SpeculativeConfig
from specrt.round.setup import SlotSetup
from specrt.sampling_params import SamplingParams
from tests.engine.fake import EOS, NGRAM, VOCAB, FakeRound, add, assert_idle, finish, has_work, logprob, make_engine, reference

PROMPT = [3, 9, 4, 4, 7]


@pytest.fixture(autouse=True, params=[0, 1], ids=["read at once", "read late"])
def lookahead(request, monkeypatch):
    """Everything holds whether a round is read when it has run or when the next one is already in flight."""
    monkeypatch.setattr(FakeRound, "lookahead", request.param)
    return request.param


@pytest.mark.parametrize("speculative", [False, {"method": "ngram", "num_speculative_tokens": 1}, NGRAM])
@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_output_is_the_models(speculative, chunk):
    engine = make_engine(prefill_chunk=chunk)
    request = add(engine, PROMPT, seed=5, max_tokens=40, speculative=speculative)
    events = finish(engine, request)
    assert request.output == reference(5, PROMPT, 40)
    assert request.finish_reason == "length"
    assert [t for _, piece in events for t in piece.token_ids] == request.output
    assert "".join(piece.text for _, piece in events) == request.text.text == engine.tokenizer.decode(request.output)
    assert events[-1][1].output.token_ids == request.output and all(piece.output is None for _, piece in events[:-1])
    assert_idle(engine)


def test_prompt_of_one_token_needs_no_prefill():
    engine = make_engine()
    request = add(engine, [7], max_tokens=3)
    finish(engine, request)
    assert request.output == reference(0, [7], 3) and engine.round.spans == []


def test_time_to_first_token_counts_from_before_the_request_is_taken():
    engine = make_engine()
    request = engine.prepare([7], SamplingParams(max_tokens=3), 0)
    time.sleep(0.01)
    engine.add(request)
    finish(engine, request)
    assert request.to_output().stats.time_to_first_token >= 0.01


def test_requests_join_and_leave_in_order_of_arrival():
    engine = make_engine(max_batch_size=2, prefill_chunk=4)
    requests = [add(engine, [1 + i] * (1 + 5 * i), seed=i, max_tokens=5 + 7 * i) for i in range(5)]
    firsts: list[int] = []
    while has_work(engine):
        for request, piece in engine.step():
            if request.number not in firsts:
                firsts.append(request.number)
        assert len(engine.scheduler.running) <= 2
    assert firsts == [0, 1, 2, 3, 4]
    for i, request in enumerate(requests):
        assert request.output == reference(i, request.prompt, request.params.max_tokens)
    assert all(sum(e - s for _, s, e in spans) <= 4 for spans in engine.round.spans)
    assert any(len(spans) > 1 for spans in engine.round.spans), "a chunk was never shared"
    assert_idle(engine)


def test_put_back_and_recomputed_gives_the_same_tokens():
    engine = make_engine(max_batch_size=4, num_pages=14, prefill_chunk=7)
    requests = [add(engine, [2 + i] * (6 + i), seed=i, max_tokens=100, logprobs=1, prompt_logprobs=1) for i in range(4)]
    finish(engine, *requests)
    for i, request in enumerate(requests):
        assert request.output == reference(i, request.prompt, 100)
        assert [list(entry.values())[0] for entry in request.logprobs] == pytest.approx([logprob(t, len(request.prompt) + k) for k, t in enumerate(request.output)])
        assert len(request.prompt_logprobs) == len(request.prompt) and request.prompt_logprobs[0] is None
    assert requests[0].stats.num_preemptions == 0, "the earliest request is never put back"
    assert engine.totals.preemptions == sum(r.stats.num_preemptions for r in requests) > 0
    assert_idle(engine)


def test_put_back_goes_to_the_front_of_the_queue():
    engine = make_engine(max_batch_size=2, num_pages=10)
    first, second, third = (add(engine, [4 + i] * 8, seed=i, max_tokens=110) for i in range(3))
    while second.stats.num_preemptions == 0:
        engine.step()
    assert list(engine.scheduler.waiting) == [second, third]
    finish(engine, first, second, third)
    for i, request in enumerate((first, second, third)):
        assert request.output == reference(i, request.prompt, 110)
    assert_idle(engine)


def test_requests_that_cannot_fit_alone_are_refused():
    engine = make_engine(num_pages=4)
    with pytest.raises(ValueError, match="kv_cache_memory"):
        add(engine, PROMPT, max_tokens=100)
    assert_idle(engine)
    longest = 4 * 16 - engine.round.slack - len(PROMPT)
    request = add(engine, PROMPT, max_tokens=longest)
    finish(engine, request)
    assert len(request.output) == longest
    with pytest.raises(ValueError, match="kv_cache_memory"):
        add(engine, PROMPT, max_tokens=longest + 1)


def test_abort_in_every_state_frees():
    engine = make_engine(max_batch_size=2, prefill_chunk=4)
    running, prefilling, waiting = add(engine, [5, 6], max_tokens=50), add(engine, [1] * 30, max_tokens=50), add(engine, [2], max_tokens=50)
    engine.step()
    assert running.active and not prefilling.active and prefilling.slot is not None and waiting.slot is None
    for request in (waiting, prefilling, running, running):
        engine.abort(request)
    assert_idle(engine)
    assert engine.totals.finished["abort"] == 3
    again = add(engine, PROMPT, max_tokens=10)
    finish(engine, again)
    assert again.output == reference(0, PROMPT, 10)


@pytest.mark.parametrize("where", range(12))
def test_end_of_text_is_cut_inside_an_accepted_block(where):
    engine = make_engine()
    before = reference(0, PROMPT, where)
    engine.round.script[tuple(PROMPT + before)] = EOS
    request = add(engine, PROMPT, max_tokens=60)
    finish(engine, request)
    assert request.output == before + [EOS] and request.finish_reason == "stop"
    assert request.text.text == engine.tokenizer.decode(before)
    accepted = request.stats.num_accepted_tokens
    assert accepted == sum(request.drafted) == sum(request.stats.num_accepted_tokens_per_pos)
    assert_idle(engine)


def test_ignore_eos_goes_on_and_stop_ids_still_end():
    engine = make_engine()
    engine.round.script[tuple(PROMPT)] = EOS
    tokens = [EOS] + reference(0, PROMPT + [EOS], 9)
    request = add(engine, PROMPT, max_tokens=10, ignore_eos=True)
    stopped = add(engine, PROMPT, max_tokens=10, ignore_eos=True, stop_token_ids=[tokens[4]])
    finish(engine, request, stopped)
    assert request.output == tokens and request.finish_reason == "length"
    assert stopped.output == tokens[:5] and stopped.finish_reason == "stop"


def test_stop_ids_reach_the_device_tables():
    engine = make_engine()
    setups: list[SlotSetup] = []
    admit = engine.round.admit
    engine.round.admit = lambda slot, setup: (setups.append(setup), admit(slot, setup))
    finish(engine, add(engine, PROMPT, max_tokens=3, stop_token_ids=[9, 8]), add(engine, PROMPT, max_tokens=2, ignore_eos=True, seed=-5))
    assert setups[0].stop_ids == (EOS, 8, 9) and setups[1].stop_ids == () and setups[1].seed == -5
    assert (setups[0].method, setups[0].num_speculative_tokens, setups[0].max_depth, setups[0].prompt_len) == ("ngram", 8, 8, len(PROMPT))


def test_stop_string_cuts_text_before_it_and_tokens_after_it():
    engine = make_engine()
    tokens = reference(0, PROMPT, 30)
    text = engine.tokenizer.decode(tokens)
    at = len(engine.tokenizer.decode(tokens[:11])) - 1
    stop = text[at : at + 4]  # begins inside token 10, ends later
    request = add(engine, PROMPT, max_tokens=30, stop=["never", stop])
    events = finish(engine, request)
    first = text.find(stop)
    assert request.text.text == text[:first] == "".join(piece.text for _, piece in events)
    done = engine.tokenizer.decode(request.output)
    assert stop in done and stop not in engine.tokenizer.decode(request.output[:-1])
    assert request.finish_reason == "stop"


def test_min_tokens_holds_for_stop_strings_and_ids():
    engine = make_engine()
    tokens = reference(0, PROMPT, 20)
    text = engine.tokenizer.decode(tokens[3:4])
    request = add(engine, PROMPT, max_tokens=20, stop=text, min_tokens=19)
    finish(engine, request)
    assert request.output == tokens, "a stop string before min_tokens does not count"
    request = add(engine, PROMPT, max_tokens=20, stop=text, min_tokens=3)
    finish(engine, request)
    assert request.output == tokens[:4]


def test_max_model_len_ends_with_length():
    engine = make_engine(max_model_len=32)
    request = add(engine, [1] * 31, max_tokens=100)
    other = add(engine, [1] * 5, max_tokens=100)
    finish(engine, request, other)
    assert len(request.output) == 1 and request.finish_reason == "length" and len(other.output) == 27
    assert_idle(engine)


@pytest.mark.parametrize("status, words", [(1, "not finite"), (2, "no token is left")])
def test_a_rounds_error_ends_its_request_only(status, words):
    engine = make_engine()
    good = add(engine, [8], max_tokens=30)
    bad = add(engine, PROMPT, max_tokens=60)
    engine.round.errors[len(PROMPT) + 35] = status  # 40 known tokens: the other request ends at 31
    finish(engine, good, bad)
    assert bad.finish_reason == "error" and words in bad.error and bad.output == reference(0, PROMPT, 35)
    assert bad.stats.num_accepted_tokens == sum(bad.drafted)
    assert good.finish_reason == "length" and good.output == reference(0, [8], 30)
    assert_idle(engine)


def test_a_failing_round_ends_all_that_run_and_raises():
    engine = make_engine(max_batch_size=1)
    running, waiting = add(engine, PROMPT), add(engine, PROMPT)
    engine.step()
    engine.round.explode = True
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    assert running.finish_reason == "error" and "device lost" in running.error and waiting.finish_reason is None
    engine.round.explode = False
    finish(engine, waiting)
    assert waiting.output == reference(0, PROMPT, 64)
    assert_idle(engine)


def test_token_mask_sees_the_output_with_the_nodes_path():
    engine = make_engine()
    seen: list[list[int]] = []

    def even(path):
        seen.append(path)
        mask = np.zeros(VOCAB, dtype=bool)
        mask[2::2] = True
        return mask

    request = add(engine, PROMPT, max_tokens=12, token_mask=even)
    alone = add(engine, PROMPT, max_tokens=12, token_mask=even, speculative=False)
    finish(engine, request, alone)
    assert all(t % 2 == 0 and t > 0 for t in request.output) and request.output == alone.output
    assert [] in seen and all(t % 2 == 0 for path in seen for t in path), "paths that are forbidden are not asked about"
    assert any(len(path) > 1 for path in seen) and all(len(path) < 12 for path in seen)
    assert request.stats.num_accepted_tokens > 0


def test_token_mask_that_fails_ends_its_request_only():
    engine = make_engine()
    good = add(engine, [8], max_tokens=30)

    def broken(path):
        if len(path) >= 4:
            raise KeyError("no such state")
        return np.ones(VOCAB, dtype=bool)

    requests = [add(engine, PROMPT, token_mask=broken), add(engine, PROMPT, token_mask=lambda path: [True] * VOCAB, max_tokens=4),
                add(engine, PROMPT, token_mask=lambda path: np.ones(VOCAB, dtype=np.int32))]
    finish(engine, good, *requests)
    assert requests[0].finish_reason == "error" and "KeyError" in requests[0].error
    assert requests[1].output == reference(0, PROMPT, 4)
    assert requests[2].finish_reason == "error" and "bool mask" in requests[2].error
    assert good.output == reference(0, [8], 30)
    assert_idle(engine)


def test_token_mask_with_nothing_left_is_an_error():
    engine = make_engine()
    request = add(engine, PROMPT, token_mask=lambda path: np.full(VOCAB, len(path) < 3))
    finish(engine, request)
    assert request.finish_reason == "error" and "token_mask" in request.error and len(request.output) == 3


def test_logprobs_one_dict_a_token():
    engine = make_engine(prefill_chunk=2)
    request = add(engine, PROMPT, max_tokens=9, logprobs=2, prompt_logprobs=2)
    finish(engine, request)
    output = request.to_output()
    assert len(output.logprobs) == 9
    for i, (token, entry) in enumerate(zip(output.token_ids, output.logprobs)):
        assert next(iter(entry)) == token and entry[token] == pytest.approx(logprob(token, len(PROMPT) + i)) and set(entry) == {token, 5, 6}
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(PROMPT)
    for position, entry in enumerate(output.prompt_logprobs[1:], start=1):
        assert next(iter(entry)) == PROMPT[position] and set(entry) == {PROMPT[position], 0, 1}
        assert entry[PROMPT[position]] == pytest.approx(logprob(PROMPT[position], position))
    plain = add(engine, PROMPT, max_tokens=2)
    finish(engine, plain)
    assert plain.to_output().logprobs is None and plain.to_output().prompt_logprobs is None


def test_statistics_agree_with_what_was_emitted():
    engine = make_engine()
    requests = [add(engine, PROMPT, seed=i, max_tokens=37) for i in range(3)] + [add(engine, PROMPT, seed=9, max_tokens=21, speculative=False)]
    finish(engine, *requests)
    for request in requests[:3]:
        stats = request.to_output().stats
        assert stats.num_accepted_tokens == sum(request.drafted) > 0
        assert stats.num_draft_tokens == sum(stats.num_draft_tokens_per_pos) == 8 * stats.num_rounds
        assert sum(stats.num_accepted_tokens_per_pos) == stats.num_accepted_tokens
        assert all(a <= d for a, d in zip(stats.num_accepted_tokens_per_pos, stats.num_draft_tokens_per_pos))
        assert stats.acceptance_length == (stats.num_accepted_tokens + stats.num_rounds) / stats.num_rounds
        assert stats.draft_acceptance_rate == stats.num_accepted_tokens / stats.num_draft_tokens
        assert stats.time_to_first_token > 0 and stats.decode_time >= 0 and stats.num_output_tokens == 37 and stats.method == "ngram"
    off = requests[3].to_output().stats
    assert (off.num_rounds, off.num_draft_tokens, off.acceptance_length, off.draft_acceptance_rate, off.method) == (21, 0, 1.0, 0.0, None)
    metrics = engine.metrics()
    for name in ("num_draft_tokens", "num_accepted_tokens", "num_rounds", "num_drafts"):
        assert metrics[f"specrt:spec_decode_{name}_total"] == sum(getattr(r.stats, name) for r in requests)
    assert metrics["specrt:spec_decode_num_drafts_total"] == sum(r.stats.num_rounds for r in requests[:3])
    assert sum(metrics["specrt:spec_decode_num_accepted_tokens_per_pos_total"].values()) == metrics["specrt:spec_decode_num_accepted_tokens_total"]
    assert sum(metrics["specrt:spec_decode_num_draft_tokens_per_pos_total"].values()) == metrics["specrt:spec_decode_num_draft_tokens_total"]
    assert metrics["specrt:generation_tokens_total"] == 3 * 37 + 21 and metrics["specrt:request_finished_total"]["length"] == 4
    assert metrics["specrt:num_requests_running"] == 0 and metrics["specrt:kv_cache_usage"] == 0.0


def test_synthetic_results_are_labelled():
    config = SpeculativeConfig.parse({"method": "ngram", "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.5})
    engine = make_engine(speculative=config)
    request = add(engine, PROMPT, max_tokens=4, speculative=None)
    finish(engine, request)
    assert request.stats.synthetic and request.stats.lossy and request.stats.rejection_sample_method == "synthetic"


@pytest.mark.parametrize("prompt, words", [([], "empty"), ([1, 64], "64"), ([-1], "-1"), ([True], "True"), ([1.0], "1.0"), (["a"], "'a'"), ([1] * 256, "max_model_len")])
def test_bad_prompts_are_refused(prompt, words):
    engine = make_engine()
    with pytest.raises(ValueError, match=words):
        add(engine, prompt)
    assert_idle(engine)


@pytest.mark.parametrize("params, words", [
    (dict(logit_bias={64: 1.0}), "logit_bias"), (dict(allowed_token_ids=[3, 64]), "allowed_token_ids"), (dict(stop_token_ids=[64]), "stop_token_ids"),
    (dict(stop_token_ids=range(64)), None), (dict(speculative={"method": "eagle3"}), "eagle3"), (dict(speculative={"num_speculative_tokens": 2}), "names no method"),
    (dict(speculative={"method": "ngram", "num_speculative_tokens": 9}), "at most 8"), (dict(speculative={"method": "ngram", "num_draft_tokens": 9}), "chains")])
def test_bad_params_are_refused(params, words):
    engine = make_engine()
    if words is None:
        add(engine, PROMPT, **params)  # 64 ids with the end of text among them: the most there may be
        return
    with pytest.raises(ValueError, match=words):
        add(engine, PROMPT, **params)
    assert_idle(engine)
