"""What goes wrong at run time ends the request it belongs to and touches no other; what is asked wrongly is a ValueError before anything starts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import specrt.cache.memory
import specrt.round.run
from specrt import LLM, SamplingParams
from specrt.cache.memory import available_memory, check_memory
from specrt.models.config import ModelConfig
from specrt.models.dense import POSITION_SLACK
from tests.kit.tiny import CONFIGS, VOCAB, random_tensors, write_folder, write_weights

BROKEN = 77  # the token whose embedding row is not finite
SHORT = dict(dtype="float32", max_model_len=128, page_size=16)
TREE = {"num_steps": 3, "eagle_topk": 2}


def changed(folder, change):
    write_folder(folder, "llama")
    tensors = random_tensors(ModelConfig.from_hf(CONFIGS["llama"]))
    change(tensors)
    write_weights(folder, tensors)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("errors") / "good", "llama")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [None, {"method": "ngram", **TREE}, {"num_speculative_tokens": 4}, TREE, {"num_speculative_tokens": 4, "rejection_sample_method": "standard"},
                                    {"num_speculative_tokens": 4, "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 3}])
def test_a_broken_row_ends_only_the_requests_that_use_it(tmp_path, good, device, value, config):
    """The others get the very bits of an engine with sound weights, in pages that the failed requests have left NaN in, too."""
    bad = changed(tmp_path / "bad", lambda tensors: tensors["model.embed_tokens.weight"][BROKEN].fill_(value))
    prompts = [[1, 2, 3, 4, 1, 2, 3], [5, BROKEN, 6, 5], [9, 8, 7] * 6, [BROKEN], [3, BROKEN]]
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=30, ignore_eos=True, logprobs=2, logit_bias={BROKEN: -100.0})
    answers = []
    for folder in (good, bad):
        own = config if config is None or "method" in config else {"method": "draft_model", "model": str(folder), **config}
        with LLM(folder, device=device, max_batch_size=3, speculative_config=own, **SHORT) as llm:
            answers.append(llm.generate(prompts, params))
            if folder is bad:
                again = llm.generate(prompts, params)
                (reached,) = llm.generate([[1, 2, 3]], SamplingParams(logit_bias={BROKEN: 90.0}, max_tokens=9, logprobs=1))
                assert llm.metrics()["specrt:kv_cache_usage"] == 0.0
    for i, (sound, first, second) in enumerate(zip(*answers, again)):
        if BROKEN in prompts[i]:
            assert first.finish_reason == second.finish_reason == "error" and first.token_ids == [] and "output token 0 are not finite" in first.error
        else:
            assert (sound.token_ids, sound.logprobs) == (first.token_ids, first.logprobs) == (second.token_ids, second.logprobs) and first.finish_reason == "length"
    assert reached.token_ids == [BROKEN] and reached.finish_reason == "error" and "output token 1" in reached.error and len(reached.logprobs) == 1


@pytest.mark.parametrize("value", [float("inf"), 3e38])
def test_infinite_logits_are_an_error(tmp_path, device, value):
    bad = changed(tmp_path / "bad", lambda tensors: tensors["lm_head.weight"][5].fill_(value))
    with LLM(bad, device=device, **SHORT) as llm:
        (piece,) = llm.stream([1, 2], SamplingParams(max_tokens=4))
        assert piece.finish_reason == "error" and "not finite" in piece.error and piece.output.token_ids == []


@pytest.mark.parametrize("draft", [{"num_speculative_tokens": 4}, TREE, {"num_speculative_tokens": 4, "rejection_sample_method": "standard"}])
def test_a_broken_drafter_changes_nothing(tmp_path, good, device, draft):
    bad = changed(tmp_path / "bad", lambda tensors: [t.fill_(float("nan")) for t in tensors.values()])
    with LLM(good, device=device, speculative_config={"method": "draft_model", "model": str(bad), **draft}, **SHORT) as llm:
        for temperature in (0.0, 1.0):
            on, off = (llm.generate([1, 2, 3], SamplingParams(temperature=temperature, seed=1, max_tokens=20, ignore_eos=True, speculative=s))[0] for s in (None, False))
            assert on.finish_reason == "length" and on.error is None
            assert on.token_ids == off.token_ids or (temperature and "rejection_sample_method" in draft)


def test_masks_that_fail(good, device):
    def nothing(path):
        return torch.zeros(VOCAB, dtype=torch.bool)

    masks = [lambda path: None, lambda path: 1 / 0, lambda path: torch.ones(VOCAB), lambda path: [True] * (VOCAB - 1), nothing]
    with LLM(good, device=device, speculative_config={"method": "ngram"}, **SHORT) as llm:
        given = [SamplingParams(max_tokens=8, ignore_eos=True, token_mask=m) for m in [None, lambda path: [True] * VOCAB, *masks]]
        plain, allowed, *failed = llm.generate([[1, 2, 3]] * len(given), given)
        assert plain.token_ids == allowed.token_ids and plain.error is None and allowed.error is None
        for out, words in zip(failed, ["bool mask", "ZeroDivisionError", "float32", f"({VOCAB - 1},)", "no token is left"]):
            assert out.finish_reason == "error" and words in out.error
        (none,) = llm.generate([1, 2], SamplingParams(allowed_token_ids=[2], min_tokens=3))
        assert none.finish_reason == "error" and "no token is left" in none.error


@pytest.mark.parametrize("where", ["write_slot", "upload"])  # its tables, or its pages
def test_a_request_that_cannot_enter_ends_alone(good, device, monkeypatch, where):
    with LLM(good, device=device, max_batch_size=2, speculative_config={"method": "ngram"}, **SHORT) as llm:
        params = SamplingParams(temperature=1.0, seed=4, max_tokens=30, ignore_eos=True)
        (want,) = llm.generate([[1, 2, 3]], params)
        stream = llm.stream([1, 2, 3], params)
        pieces = [next(stream)]
        with monkeypatch.context() as broken:
            broken.setattr(specrt.round.run, where, lambda *_: 1 / 0)
            (failed,) = llm.generate([[5, 6]], params)
        assert failed.finish_reason == "error" and failed.token_ids == [] and "could not enter its slot: ZeroDivisionError" in failed.error
        (again,) = llm.generate([[1, 2, 3]], params)
        pieces += list(stream)
        assert again.token_ids == want.token_ids == stream.output.token_ids == [token for piece in pieces for token in piece.token_ids]
        assert llm.metrics()["specrt:kv_cache_usage"] == 0.0


def test_memory_and_batch_sizes(good):
    page = 3 * 2 * 2 * 16 * 64 * 4
    with pytest.raises(ValueError, match="kv_cache_memory = 1000 bytes hold no page"):
        LLM(good, device="cpu", kv_cache_memory=1000, **SHORT)
    given = SamplingParams(max_tokens=50, ignore_eos=True)
    prompts = [[1, 2, 3 + i] for i in range(5)]
    answers = []
    for settings in ({"kv_cache_memory": 6 * page}, {"max_batch_size": 1}, {"max_batch_size": 64}):
        with LLM(good, device="cpu", **SHORT, **settings) as llm:
            answers.append([o.token_ids for o in llm.generate(prompts, given)])
            if "kv_cache_memory" in settings:
                assert llm.metrics()["specrt:num_preemptions_total"] > 0
                with pytest.raises(ValueError, match="KV cache is too small"):
                    llm.generate([1] * 50, SamplingParams(max_tokens=60))
    assert answers[0] == answers[1] == answers[2]


def test_what_memory_does_not_hold_is_said_before_it_is_taken(tmp_path, good, monkeypatch):
    monkeypatch.setattr(specrt.cache.memory, "MEMINFO", tmp_path / "meminfo")
    settings = dict(device="cpu", max_batch_size=1024, max_model_len=512, dtype="float32", page_size=64)
    page = 3 * 2 * 2 * 64 * 64 * 4
    cache, logits = 1024 * 9 * page, 1024 * VOCAB * (4 * 9 + 9)  # 9 pages hold 512 positions and a round's; 9 rows a slot
    for available in (10**9, cache + logits - 1024):
        (tmp_path / "meminfo").write_text(f"MemTotal:       99999999 kB\nMemFree:           16 kB\nMemAvailable:    {available // 1024} kB\n")
        assert available_memory() == available // 1024 * 1024
        with pytest.raises(ValueError, match=r"max_batch_size = 1024, max_model_len = 512 and kv_cache_memory = None take at least 1\.83 GB.*1\.81 GB.*0\.01 GB for logits.* are available"):
            LLM(good, **settings)
        with pytest.raises(ValueError, match="kv_cache_memory = 1900000000 take"):
            LLM(good, kv_cache_memory=1_900_000_000, **settings)
        with LLM(good, kv_cache_memory=20 * page, **settings) as llm:
            buffers = (x for x in vars(llm._engine.round.state).values() if isinstance(x, torch.Tensor))
            assert sum(x.nbytes for x in buffers if x.shape[-1:] == (VOCAB,)) == logits
    (tmp_path / "meminfo").write_text(f"MemAvailable: {(cache + logits) // 1024 + 1} kB\n")
    check_memory(1024, 512, None, cache, logits)


@pytest.mark.parametrize("name", ["meminfo", "none", "."])
def test_where_the_system_does_not_say_what_is_available(tmp_path, monkeypatch, name):
    (tmp_path / "meminfo").write_text("MemTotal: 1024 kB\n")
    monkeypatch.setattr(specrt.cache.memory, "MEMINFO", tmp_path / name)
    assert available_memory() is None


@pytest.mark.parametrize("method", ["ngram", "draft_model", "layerskip"])
def test_positions_that_are_not_served_cost_nothing(tmp_path, good, device, method):
    """A config may say 10^9 of them: the tables of angles are as long as what is served, with the same bits."""
    far = write_folder(tmp_path / "far", {**CONFIGS["llama"], "max_position_embeddings": 10**9})
    answers = []
    for folder in (good, far):
        spec = {"method": method} | {"draft_model": {"model": str(folder)}, "layerskip": {"exit_layer": 1}}.get(method, {})
        with LLM(folder, device=device, dtype="float32", max_model_len=64, page_size=16, speculative_config=spec) as llm:
            answers.append(llm.generate([[1, 2, 3], [4] * 60], SamplingParams(temperature=1.0, seed=1, max_tokens=61, ignore_eos=True)))
            models = [llm._engine.round.target] + [d.model for d in llm._engine.round.drafters.values() if hasattr(d, "model")]
            assert [(len(m.cos), len(m.sin)) for m in models] == [(64 + POSITION_SLACK,) * 2] * (1 + (method != "ngram"))
    assert [o.token_ids for o in answers[0]] == [o.token_ids for o in answers[1]] and [len(o.token_ids) for o in answers[1]] == [61, 4]


def test_a_draft_model_with_another_tokenizer_is_refused(good):
    with pytest.raises(ValueError, match="another tokenizer"):
        LLM(good, device="cpu", speculative_config={"method": "draft_model", "model": "smollm2-135m"})


def test_the_shell_says_it_in_one_line(tmp_path, good):
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    commands = [["--file", str(tmp_path / "latin1.txt")], ["--file", str(tmp_path / "none.txt")], ["hi", "--temperature", "-1"], [""], ["hi", "--max-model-len", "4000"],
                ["hi", "--spec", '{"method": "eagle9"}'], ["hi", "--model", str(tmp_path / "cut.gguf")], ["hi"] if torch.cuda.is_available() else ["hi", "--device", "cuda"]]
    program = "import sys, specrt.cli as c\nfor a in eval(sys.stdin.read()):\n    print(c.main(a), file=sys.stderr)"
    argv = [["generate", "--model", str(good), *c] for c in (commands if not torch.cuda.is_available() else commands[:-1])]
    done = subprocess.run([sys.executable, "-c", program], input=repr(argv), text=True, capture_output=True, timeout=120)
    lines = done.stderr.splitlines()
    assert done.stdout == "" and lines[1::2] == ["2"] * len(argv) and all(line.startswith("specrt generate: error: ") for line in lines[::2]), done.stderr
    assert "not UTF-8 text: byte 3" in lines[0]
