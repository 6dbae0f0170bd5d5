"""The tokenizer that a GGUF file describes in its metadata, rebuilt for the tokenizers library.

Two kinds: "gpt2", byte-level BPE with explicit merges and a pre-tokenizer known by name (tokenizer.ggml.pre), and "llama", SentencePiece BPE, whose merges
follow from the pieces' scores."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(first: pre_tokenizers.PreTokenizer | None, gpt2_words: bool):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_words)
    return pre_tokenizers.Sequence([first, last]) if first else last


def _gpt2():
    return _byte_level(None, True)


def _smollm():
    """Digits one by one, then GPT-2's words."""
    return _byte_level(pre_tokenizers.Digits(individual_digits=True), True)


def _llama3():
    return _byte_level(pre_tokenizers.Split(Regex(_WORDS % "{1,3}"), "isolated"), False)


def _qwen2():
    return _byte_level(pre_tokenizers.Split(Regex(_WORDS % ""), "isolated"), False)


_PRE_TOKENIZERS = {"default": _gpt2, "gpt-2": _gpt2, "gpt2": _gpt2, "smollm": _smollm, "llama-bpe": _llama3, "llama3": _llama3, "llama-v3": _llama3,
                   "qwen2": _qwen2, "deepseek-r1-qwen": _qwen2}


def tokenizer_from_metadata(metadata: dict[str, Any], origin: str) -> Tokenizer:
    """ValueError if the metadata holds no tokenizer, an unknown kind, or one that contradicts itself."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{origin}: tokenizer.ggml.model = {kind!r} is not supported; supported: 'gpt2' (byte-level BPE), 'llama' (SentencePiece)")
    tokens = _list(metadata, "tokens", str, origin)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocab[t] != i)
        raise ValueError(f"{origin}: tokenizer.ggml.tokens holds {twice!r} more than once")
    types = _list(metadata, "token_type", int, origin, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ValueError(f"{origin}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    # Names that the converter gave to rows which pad the embedding; without them the vocabulary is that of the original tokenizer.
    vocab = {token: i for token, i in vocab.items() if types[i] != _UNUSED or not token.startswith("[PAD")}
    pre = metadata.get("tokenizer.ggml.pre", "default")
    backend = _sentencepiece(metadata, vocab, tokens, types, origin) if kind == "llama" else _bpe(metadata, vocab, pre, origin)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == _CONTROL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, types) if k == _USER_DEFINED])
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or _PRE_TOKENIZERS.get(pre) is _llama3)
    if adds_bos and bos is not None:
        if not isinstance(bos, int) or not 0 <= bos < len(tokens):
            raise ValueError(f"{origin}: tokenizer.ggml.bos_token_id = {bos!r} is outside the {len(tokens)} tokens")
        backend.post_processor = processors.TemplateProcessing(single=f"{tokens[bos]}:0 $A:0", special_tokens=[(tokens[bos], bos)])
    return backend


def _bpe(metadata: dict[str, Any], vocab: dict[str, int], pre: str, origin: str) -> Tokenizer:
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"{origin}: tokenizer.ggml.pre = {pre!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}")
    merges = [tuple(m.split(" ")) for m in _list(metadata, "merges", str, origin)]
    bad = next((m for m in merges if len(m) != 2 or m[0] not in vocab or m[1] not in vocab or "".join(m) not in vocab), None)
    if bad is not None:
        raise ValueError(f"{origin}: tokenizer.ggml.merges holds {' '.join(bad)!r}, which is no merge of two tokens into a third")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=_PRE_TOKENIZERS[pre] is _llama3))
    if _PRE_TOKENIZERS[pre] is _qwen2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any], vocab: dict[str, int], tokens: list[str], types: list[int], origin: str) -> Tokenizer:
    scores = _list(metadata, "scores", float, origin)
    if len(scores) != len(tokens):
        raise ValueError(f"{origin}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    pieces = {t for t, k in zip(tokens, types) if k == _NORMAL}
    # SentencePiece merges the neighbours whose union has the best score: so every split of a piece into two pieces is a merge of that score.
    splits = [(t[:i], t[i:]) for t in pieces for i in range(1, len(t)) if t[:i] in pieces and t[i:] in pieces]
    splits.sort(key=lambda pair: (-scores[vocab[pair[0] + pair[1]]], vocab[pair[0] + pair[1]], len(pair[0])))
    unknown = next((t for t, k in zip(tokens, types) if k == _UNKNOWN), None)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=splits, unk_token=unknown, fuse_unk=True, byte_fallback="<0x00>" in vocab))
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefixed else space
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _list(metadata: dict[str, Any], name: str, kind: type, origin: str, default: list | None = None) -> list:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
        raise ValueError(f"{origin}: metadata 'tokenizer.ggml.{name}' must be a list of {kind.__name__}, " + ("and it is missing" if value is None else f"got {type(value).__name__}"))
    return value
