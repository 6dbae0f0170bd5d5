"""The shell on a stand-in for ``specrt.LLM``: what reaches the API, what is printed, exit codes."""

import inspect
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

import specrt
import specrt.llm
from specrt.cli import main, measure, options, outputs
from specrt.cli.prompts import BUILT_IN, load_prompts


@dataclass
class Params:
    values: dict

    def __init__(self, **values):
        self.values = values


@dataclass
class Stub:
    """Answers every prompt with its length, as tokens 1 2 3 ...; records how it was called."""

    text: str = "4 words of text"
    made: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    error: str | None = None
    differs: bool = False

    def __call__(self, model, **options):
        self.made.append((model, options))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    tokenizer = SimpleNamespace(decode=lambda ids: " text" if ids == [4] else "?")

    def generate(self, prompts, params, chat=False):
        self.asked.append((prompts, params.values, chat))
        on = params.values.get("speculative", True) is not False
        tokens = [1, 2, 3, 5 if self.differs and on else 4]
        stats = SimpleNamespace(num_rounds=2 if on else 4, num_drafts=2 * on, num_draft_tokens=4 * on, num_accepted_tokens=2 * on, acceptance_length=2.0 if on else 1.0,
                                draft_acceptance_rate=0.5, num_draft_tokens_per_pos=[2, 2] if on else [], num_accepted_tokens_per_pos=[2, 0] if on else [],
                                time_to_first_token=0.1, decode_time=0.2 if on else 0.4)
        output = SimpleNamespace(text=self.text, token_ids=tokens, prompt_token_ids=[9], finish_reason="error" if self.error else "stop", error=self.error, seed=7,
                                 logprobs=None, stats=stats, samples=[])
        output.samples = [output] * params.values.get("n", 1)
        return [output for _ in prompts]

    def stream(self, prompt, params, chat=False):
        self.asked.append((prompt, params.values, chat))
        for text, tokens, drafted in [("4", [1], [False]), (" words of", [2, 3], [True, True]), (" text", [4], [False])]:
            yield SimpleNamespace(text=text, token_ids=tokens, drafted=drafted, error=self.error if tokens == [4] else None)


@pytest.fixture
def llm(monkeypatch):
    stub = Stub()
    monkeypatch.setattr(specrt, "LLM", stub, raising=False)
    monkeypatch.setattr(specrt, "SamplingParams", Params, raising=False)
    return stub


def stdin(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_generate_passes_on_only_what_was_given(llm, capsys):
    assert main(["generate", "Hello"]) == 0
    assert capsys.readouterr().out == "4 words of text\n"
    assert llm.made == [("smollm2-135m", {"speculative_config": None, "max_batch_size": 1})] and llm.asked == [(["Hello"], {}, False)]


def test_generate_flags_become_parameters(llm):
    flags = ["--chat", "--system", "Be brief.", "--temperature", "0.7", "--top-k", "40", "--seed", "3", "--stop", "A", "--stop", "B", "--ignore-eos",
             "--logit-bias", '{"5": -1}', "--model", "m", "--dtype", "float32", "--device", "cpu", "--spec", '{"method": "ngram", "prompt_lookup_max": 3}',
             "--num-speculative-tokens", "4"]
    assert main(["generate", "Hi", *flags]) == 0
    assert llm.made == [("m", {"speculative_config": {"method": "ngram", "prompt_lookup_max": 3, "num_speculative_tokens": 4}, "max_batch_size": 1, "dtype": "float32", "device": "cpu"})]
    messages, params, chat = llm.asked[0]
    assert messages == [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]] and chat
    assert params == {"temperature": 0.7, "top_k": 40, "seed": 3, "stop": ["A", "B"], "ignore_eos": True, "logit_bias": {5: -1.0}}


def test_every_argument_of_llm_has_its_flag():
    accepted = set(inspect.signature(specrt.llm.LLM.__init__).parameters) - {"self", "model", "speculative_config"}
    assert accepted == set(options.ENGINE)


@pytest.mark.parametrize("command", [["generate", "Hi"], ["chat"], ["bench"], ["bench", "--acceptance"], ["train", "prompts", "--output", "FILE"], ["train", "capture", "--prompts", "PROMPTS", "--output", "FILE"]],
                         ids=lambda c: " ".join(part for part in c[:2] if part != "Hi"))
def test_the_memory_of_keys_and_values_reaches_the_engine(monkeypatch, capsys, tmp_path, command):
    def refuse(model, **given):
        raise ValueError(f"LLM got {given['kv_cache_memory']!r} and {given['max_model_len']!r}")

    (tmp_path / "PROMPTS").write_text('{"prompt": "a", "category": "b"}')
    monkeypatch.setattr(specrt, "LLM", refuse, raising=False)
    assert main([*(str(tmp_path / part) if part.isupper() else part for part in command), "--kv-cache-memory", "1000000000", "--max-model-len", "99"]) == 2
    assert capsys.readouterr().err.endswith("LLM got 1000000000 and 99\n")


def test_a_draft_model_chooses_its_method(llm):
    assert main(["generate", "Hi", "--draft-model", "small", "--num-steps", "3", "--eagle-topk", "4"]) == 0
    assert llm.made[0][1]["speculative_config"] == {"method": "draft_model", "num_steps": 3, "eagle_topk": 4, "model": "small"}


def test_generate_streams(llm, capsys):
    assert main(["generate", "Hi", "--stream"]) == 0
    assert capsys.readouterr().out == "4 words of text\n"


def test_generate_json_has_tokens_and_statistics(llm, capsys):
    assert main(["generate", "Hi", "--json", "--n", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and lines[0]["token_ids"] == [1, 2, 3, 4] and lines[0]["stats"]["acceptance_length"] == 2.0 and lines[0]["seed"] == 7


def test_generate_reads_files_and_standard_input(llm, monkeypatch, tmp_path):
    (tmp_path / "p").write_text("aus der Küche", encoding="utf-8")
    assert main(["generate", "--file", str(tmp_path / "p")]) == 0
    stdin(monkeypatch, "père".encode())
    assert main(["generate"]) == 0
    assert [prompts for prompts, _, _ in llm.asked] == [["aus der Küche"], ["père"]]


@pytest.mark.parametrize("flags", [[], ["--stream"], ["--json"]])
def test_a_failed_request_is_exit_code_1(llm, capsys, flags):
    llm.error = "logits are not finite"
    assert main(["generate", "Hi", *flags]) == 1
    assert "logits are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [
    ["generate", "--file", "/nonexistent"], ["generate", "--file", "BAD"], ["generate", "a", "--file", "b"], ["generate", "a", "--stream", "--n", "2"],
    ["generate", "a", "--stream", "--json"], ["generate", "a", "--system", "b"], ["generate", "a", "--method", "none", "--num-steps", "2"],
    ["bench", "--prompts", "BAD"], ["bench", "--prompts", "LIST"], ["bench", "--prompts", "EMPTY"], ["bench", "--category", "poetry"], ["bench", "--method", "none"],
    ["bench", "--repeats", "0"], ["bench", "--n", "2"], ["chat", "--n", "2"],
])
def test_bad_input_is_one_line_and_exit_code_2(llm, capsys, tmp_path, argv):
    files = {"BAD": b"caf\xe9", "LIST": b'{"turns": []}\n', "EMPTY": b"\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / a) if a in files else a for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and captured.err.startswith(f"specrt {argv[0]}: error: ")


@pytest.mark.parametrize("argv", [[], ["dance"], ["generate", "a", "--spec", "{"], ["generate", "a", "--spec", "[1]"], ["generate", "a", "--logit-bias", '{"x": 1}'],
                                  ["generate", "a", "--top-k", "many"], ["inspect"]])
def test_bad_flags_are_one_line_and_exit_code_2(llm, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_errors_of_the_api_are_one_line(llm, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ValueError("speculative_config['method']: unknown\n  method 'magic'")

    monkeypatch.setattr(specrt, "LLM", refuse)
    assert main(["generate", "Hi", "--method", "magic"]) == 2
    assert capsys.readouterr().err == "specrt generate: error: speculative_config['method']: unknown method 'magic'\n"


@pytest.mark.parametrize("error, said", [(OSError(28, "No space left on device", "/data/out.json"), "No space left on device: /data/out.json"), (ConnectionError("the hub\nis away"), "the hub is away")])
def test_errors_of_the_system_are_one_line(llm, monkeypatch, capsys, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(specrt, "LLM", fail)
    assert main(["generate", "Hi"]) == 2
    assert capsys.readouterr().err == f"specrt generate: error: {said}\n"


WORK = {"bench": ["bench", "--json"], "acceptance": ["bench", "--acceptance", "--json"], "picture": ["bench", "--acceptance", "--html"], "prompts": ["train", "prompts", "--output"],
        "capture": ["train", "capture", "--prompts", "PROMPTS", "--output"], "head": ["train", "eagle3", "--data", "PROMPTS", "--output"]}


REFUSED = [*((work, "/proc/none", "No such file or directory") for work in WORK), *((work, "FOLDER", "Is a directory") for work in WORK if work != "head"),
           *((work, output, "there is no such folder") for work in ("bench", "acceptance", "picture") for output in ("FOLDER/none/x", "PROMPTS/x")),
           *((work, "PROMPTS/x", "Not a directory") for work in ("prompts", "capture", "head"))]  # these make folders


@pytest.mark.parametrize("work, output, said", REFUSED)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(llm, capsys, tmp_path, work, output, said):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "category": "b"}')
    command = [part.replace("PROMPTS", str(prompts)).replace("FOLDER", str(tmp_path)) for part in [*WORK[work], output]]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err == f"specrt {command[0]}: error: cannot write {command[-1]}: {said}\n"
    assert captured.out == "" and llm.made == [] and list(tmp_path.iterdir()) == [prompts]


def test_trying_an_output_changes_nothing(tmp_path):
    there, new, deep, link, pipe = (tmp_path / name for name in ("there", "new", "a/b/c", "link", "pipe"))
    there.write_text("kept")
    os.utime(there, (1, 1))
    link.symlink_to(new)
    os.mkfifo(pipe)
    before = sorted(tmp_path.iterdir())
    for file in (there, new, link, pipe):
        outputs.check_file(str(file))
    outputs.check_file(str(deep), make_folders=True)
    outputs.check_folder(str(tmp_path))
    outputs.check_folder(str(deep))
    assert sorted(tmp_path.iterdir()) == before and there.read_text() == "kept" and there.stat().st_mtime == 1
    with pytest.raises(ValueError, match="name too long"):
        outputs.check_file(str(tmp_path / ("x" * 300)))
    with pytest.raises(ValueError, match="cannot write .*there: Not a directory"):
        outputs.check_folder(str(there))


def test_an_interrupt_is_clean(llm, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "generate", interrupt, raising=False)
    assert main(["generate", "Hi"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "inspect"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "usage: specrt " + command in capsys.readouterr().out


@pytest.mark.parametrize("argv, left_out", [
    (["--help"], {"torch", "numpy", "rich", "tokenizers", "safetensors", "specrt.llm", "specrt.ops", "specrt.train"}),
    (["generate", "--help"], {"torch", "numpy", "rich", "specrt.llm", "specrt.train"}), (["generate", "a", "--stream", "--json"], {"torch", "specrt.train"}),
    (["train", "eagle3", "--help"], {"torch", "numpy", "specrt.llm", "specrt.train.objectives", "specrt.train.trainer"})],
    ids=["help", "help of generate", "a refusal", "help of train"])
def test_a_command_imports_what_it_needs(argv, left_out):
    """A help text, or a refusal, is there at once: torch alone takes a second to import."""
    program = f"import atexit, sys; atexit.register(lambda: print('MODULES', *sys.modules)); from specrt.cli import main; sys.exit(main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if "--help" in argv else 2), done.stderr
    imported = set(done.stdout.split("MODULES")[-1].split())
    assert "specrt.cli" in imported and not imported & left_out


def test_chat_keeps_the_conversation(llm, monkeypatch, capsys):
    stdin(monkeypatch, b"one\n\ntwo\n/reset\nthree\n/exit\n")
    assert main(["chat", "--system", "S"]) == 0
    roles = [[m["role"] for m in messages] for messages, _, _ in llm.asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert llm.asked[1][0][2]["content"] == "4 words of text" and all(chat for _, _, chat in llm.asked)
    assert llm.made[0][1]["speculative_config"] == {"method": "ngram"}
    assert "\x1b" not in capsys.readouterr().out  # not a terminal


def test_chat_colours_drafted_tokens():
    from specrt.cli.chat import DRAFTED, PLAIN, coloured

    piece = lambda text, ids, drafted: SimpleNamespace(text=text, token_ids=ids, drafted=drafted)  # noqa: E731
    assert coloured(piece("4", [1], [False]), Stub.tokenizer.decode) == "4"
    assert coloured(piece(" of text", [3, 4], [True, False]), Stub.tokenizer.decode) == f"{DRAFTED} of{PLAIN} text"
    assert coloured(piece(" of", [3, 9], [True, False]), Stub.tokenizer.decode) == f"{DRAFTED} of{PLAIN}"


def test_bench_compares_off_with_on(llm, capsys, tmp_path):
    assert main(["bench", "--repeats", "2", "--limit", "1", "--json", str(tmp_path / "out.json")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    total = document["results"][-1]
    assert total["category"] == "all" and total["identical"] and document["differing"] == []
    assert total["off_tokens_per_s"] == pytest.approx(3 / 0.4) and total["ratio"] == pytest.approx(2.0)
    assert total["acceptance_length"] == 2.0 and total["acceptance_per_pos"] == [1.0, 0.0]
    modes = [params.get("speculative") for _, params, _ in llm.asked]
    assert modes.count(False) == modes.count(None) - 1 == 2 * document["results"][-1]["prompts"]
    out = capsys.readouterr().out
    assert "drafts by position" in out and "yes" in out and "NO" not in out


def test_bench_fails_where_outputs_differ(llm, capsys):
    llm.differs = True
    assert main(["bench", "--repeats", "1", "--category", "chat", "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["differing"] == ["open-question"] and "changed the output" in captured.err


def test_rates_are_medians_with_their_spread():
    stats = SimpleNamespace()
    timed = measure.Timed([1, 2, 3], seconds=[2.0, 1.0, 4.0], decode_seconds=[1.0, 0.5, 2.0], stats=stats)
    assert measure.rate([timed]) == measure.Rate(2.0, (4 - 1) / 2)
    assert measure.rate([timed], decode=False).value == pytest.approx(1.5)


def test_the_built_in_prompts_are_of_the_kinds_promised():
    prompts = load_prompts(BUILT_IN)
    assert len({p.id for p in prompts}) == len(prompts) >= 6
    assert {"summarisation", "code", "rewriting", "chat"} <= {p.category for p in prompts}
    assert sum(len(p.text) > 1500 for p in prompts) >= 2
