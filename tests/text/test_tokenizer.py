import json

import pytest

from specrt.text import Tokenizer
from specrt.text.gguf_vocab import tokenizer_from_metadata
from specrt.weights import open_checkpoint
from tests.kit.tiny import CHAT_TEMPLATE, SPECIAL, tiny_tokenizer, write_folder, write_gguf

TEXTS = ["", " ", "The theatre and the inn.", "naïve café, 你好世界! 😀👩‍👩‍👧", "tabs\tand\n\n  lines \r\n", "12345 + 67.8 = x²", "a" * 300, "مرحبا שלום", "\x00\x7f"]
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "m", "llama")


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text):
    tokenizer = Tokenizer(tiny_tokenizer())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_folder_and_gguf_agree(folder, tmp_path):
    a, b = open_checkpoint(folder).tokenizer(), open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama")).tokenizer()
    for text in [*TEXTS, "<|im_start|>user\nthe end<|im_end|>"]:
        assert a.encode(text) == b.encode(text)
    assert a.apply_chat_template(USER) == b.apply_chat_template(USER) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert len(a) == 265 and a.fingerprint() == b.fingerprint()  # though the GGUF names its padding rows


def test_special_tokens_are_parsed_or_plain_text():
    tokenizer = Tokenizer(tiny_tokenizer())
    assert tokenizer.encode("<|im_end|>") == [2] and len(tokenizer.encode("<|im_end|>", special=False)) == 10
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.decode([2]) == "" and tokenizer.decode([2], skip_special=False) == "<|im_end|>" and tokenizer.decode([299]) == ""


@pytest.mark.parametrize("text", TEXTS + ["😀" * 5])
def test_streaming_gives_the_decoded_text_and_no_half_character(text):
    tokenizer = Tokenizer(tiny_tokenizer())
    ids = tokenizer.encode(text)
    stream = tokenizer.detokenizer()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == text and not any("\ufffd" in p for p in pieces)


def test_streaming_of_bytes_that_are_no_text():
    tokenizer = Tokenizer(tiny_tokenizer())
    byte = {b: tokenizer.encode("é😀")[i] for i, b in enumerate("é😀".encode())}
    for run in ([0xF0], [0xC3, 0xC3, 0xA9], [0x9F] * 9, [0xF0, 0x9F, 0x98], [0xF0, 0x9F, 0xC3, 0xA9, 0x80]):
        ids = [byte.get(b, byte[0x80]) for b in run] if 0x80 in byte else [byte[b] for b in run if b in byte]
        stream = tokenizer.detokenizer()
        pieces = [stream.push(i) for i in [*ids, *tokenizer.encode(" end")]]
        assert "".join(pieces) + stream.flush() == tokenizer.decode([*ids, *tokenizer.encode(" end")])
        assert pieces[-1]  # a broken character holds nothing back for long


def test_fingerprint_is_of_the_content():
    a, b = tiny_tokenizer(), tiny_tokenizer()
    assert Tokenizer(a).fingerprint() == Tokenizer(b).fingerprint()
    b.add_tokens(["x y"])
    assert Tokenizer(a).fingerprint() != Tokenizer(b).fingerprint()


@pytest.mark.parametrize("text", [3, None, b"x", "\ud800"])
def test_text_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="text"):
        Tokenizer(tiny_tokenizer()).encode(text)


# ------------------------------------------------------------------------------------------------ chat


def with_template(folder, template, **files):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return Tokenizer.from_folder(folder)


def test_template_language(folder):
    t = with_template(folder, "{{ bos_token }}{% for m in messages %}\n    {% if m['role'] == 'skip' %}\n    {% continue %}\n    {% endif %}\n[{{ m | tojson }}]{% endfor %}"
                              "{% generation %}{{ eos_token }}{% endgeneration %}{{ strftime_now('%%') }}")
    messages = [{"role": "skip", "content": ""}, {"role": "user", "content": "<é>"}]
    assert t.apply_chat_template(messages) == '<|endoftext|>[{"role": "user", "content": "<é>"}]<|im_end|>%'


def test_template_sources(folder):
    assert with_template(folder, [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]).apply_chat_template(USER) == "D"
    (folder / "chat_template.jinja").write_text("J{{ add_generation_prompt }}")
    assert with_template(folder, "K").apply_chat_template(USER, add_generation_prompt=False) == "JFalse"


@pytest.mark.parametrize("template, message", [
    ("{% for %}", "the chat template is not valid"), (7, "chat_template must be a string"), ("{{ raise_exception('only user turns') }}", "refuses these messages: only user turns"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"), ("{{ messages.clear() }}", "refuses these messages"), ("{{ 1 / 0 }}", "refuses these messages")])
def test_bad_and_hostile_templates_are_refused(folder, template, message):
    with pytest.raises(ValueError, match=message):
        with_template(folder, template).apply_chat_template(USER)


@pytest.mark.parametrize("messages", [[], "Hi", [{"role": "user"}], [{"role": 1, "content": "x"}], ["Hi"], [{"role": "user", "content": None}]])
def test_bad_messages_are_refused(folder, messages):
    with pytest.raises(ValueError, match="messages"):
        Tokenizer.from_folder(folder).apply_chat_template(messages)


def test_without_a_template_or_a_tokenizer(folder):
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(tiny_tokenizer(), origin="m").apply_chat_template(USER)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not readable JSON"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a readable tokenizer"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        Tokenizer.from_folder(folder)


# ------------------------------------------------------------------------------------------------ GGUF


def pieces(metadata, text):
    backend = tokenizer_from_metadata(metadata, "x")
    return [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


BYTES = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": list(tiny_tokenizer().get_vocab()), "tokenizer.ggml.merges": []}


@pytest.mark.parametrize("pre, want", [
    ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġdays", "!!"]), ("gpt-2", ["It", "'s", "Ġ1234", "Ġdays", "!!"]),
    ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "Ġdays", "!!"]), ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġdays", "!!"])])
def test_pre_tokenizers(pre, want):
    assert pieces({**BYTES, "tokenizer.ggml.pre": pre}, "It's 1234 days!!") == want


def test_llama3_adds_bos_and_others_do_not():
    ids = dict.fromkeys(("smollm", "gpt-2", "qwen2", "llama-bpe"))
    for pre in ids:
        ids[pre] = tokenizer_from_metadata({**BYTES, "tokenizer.ggml.pre": pre, "tokenizer.ggml.bos_token_id": 0}, "x").encode("a").ids
    assert [len(i) for i in ids.values()] == [1, 1, 1, 2]


SPM_PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{b:02X}>", 0.0, 6) for b in range(256)),
              *((p, -float(i), 1) for i, p in enumerate(["▁t", "he", "▁the", "in", "▁in", "er", "the", "▁", "t", "h", "e", "i", "n", "r", "s", "<", ">", "s>"]))]
SPM = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [p for p, _, _ in SPM_PIECES], "tokenizer.ggml.scores": [s for _, s, _ in SPM_PIECES],
       "tokenizer.ggml.token_type": [t for _, _, t in SPM_PIECES], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def sentencepiece(text):
    """The algorithm by its definition: characters, then always the neighbours whose union scores best (leftmost on ties); bytes for what is no piece."""
    score = {p: s for p, s, t in SPM_PIECES if t == 1}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        best = max(((score[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in score), default=None)
        if best is None:
            return [q for p in parts for q in ([p] if p in score else [f"<0x{b:02X}>" for b in p.encode()])]
        i = -best[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("text", ["the inner in", "there  is", "<s> in", "é the 你", "iiinnn thethe"])
def test_sentencepiece(text):
    tokenizer = Tokenizer.from_metadata(SPM, "x")
    ids = tokenizer.encode(text, special=False)
    assert ids[0] == 1 and [tokenizer.id_to_token(i) for i in ids[1:]] == sentencepiece(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.detokenizer()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == text


@pytest.mark.parametrize("change, message", [
    ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model = 'bert'"), ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre = 'tekken'.*smollm"),
    ({"tokenizer.ggml.tokens": None}, "tokens' must be a list of str"), ({"tokenizer.ggml.tokens": ["a", "a"]}, "holds 'a' more than once"),
    ({"tokenizer.ggml.merges": ["a zz"]}, "merges holds 'a zz'"), ({"tokenizer.ggml.merges": ["abc"]}, "merges holds 'abc'"),
    ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries for 265 tokens"),
    ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 999}, "bos_token_id = 999 is outside")])
def test_bad_metadata_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_metadata({**BYTES, **change}, "x")


def test_the_template_of_the_kit_is_what_the_files_hold():
    assert all(s in CHAT_TEMPLATE for s in SPECIAL[1:])
