"""Tokenizer: text <-> token ids of a checkpoint, and its chat template."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from specrt.text.chat import ChatTemplate
from specrt.text.detokenizer import IncrementalDetokenizer
from specrt.text.gguf_vocab import tokenizer_from_metadata

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The checkpoint's tokenizer. ``len(tokenizer)`` is the number of tokens (a model's vocab_size may be padded beyond it)."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None, origin: str = "tokenizer"):
        self.backend, self._chat_template, self._origin = backend, chat_template, origin
        self._lock = threading.Lock()
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja. ValueError if the first is missing or any is broken."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no tokenizer.json; prompts must then be given as token ids (a tokenizer.model can be converted with transformers)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from None
        config = _json_object(folder / "tokenizer_config.json")
        special = {name: content for name in _SPECIAL_NAMES if isinstance(content := _content(config.get(name)), str)}
        template = _template(folder, config)
        return cls(backend, ChatTemplate(template, special, str(folder)) if template else None, str(folder))

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], origin: str) -> Tokenizer:
        """From the metadata of a GGUF file. ValueError if they hold no tokenizer, or one that is not supported."""
        backend = tokenizer_from_metadata(metadata, origin)
        template = metadata.get("tokenizer.chat_template")
        ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in zip(_SPECIAL_NAMES, ("bos", "eos", "unknown", "padding"))}
        special = {name: token for name, i in ids.items() if isinstance(i, int) and (token := backend.id_to_token(i)) is not None}
        return cls(backend, ChatTemplate(template, special, origin) if template else None, origin)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = True, bos: bool = True) -> list[int]:
        """special: special tokens written out in the text ("<|im_end|>") become their ids; False: they are plain text. bos: add what the checkpoint
        adds to a text by itself (for most a BOS token or nothing); False for text from ``apply_chat_template``, whose template writes it."""
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode: {error}") from None
        with self._lock:  # the switch is a property of the backend
            self.backend.encode_special_tokens = not special
            return self.backend.encode(text, add_special_tokens=bos).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Ids past the vocabulary (a model's padding rows) decode to nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def detokenizer(self, skip_special: bool = True) -> IncrementalDetokenizer:
        """A fresh incremental decoder, for streaming and stop strings."""
        return IncrementalDetokenizer(lambda ids: self.backend.decode(ids, skip_special_tokens=skip_special))

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation. Encode it with ``bos=False``."""
        if self._chat_template is None:
            raise ValueError(f"{self._origin} has no chat template; give the prompt as plain text")
        return self._chat_template.render(messages, add_generation_prompt)

    def fingerprint(self) -> str:
        """sha256 of the vocabulary's content, token -> id: two models share a tokenizer if theirs are equal, whatever their files and sizes."""
        vocab = sorted(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps(vocab, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the key of tokenizer_config.json: one template, or several by name of which "default" counts."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not readable: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of named templates, got {type(template).__name__}")
    return template


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, got {type(value).__name__}")
    return value
