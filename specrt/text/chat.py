"""ChatTemplate: a checkpoint's jinja template, run in a sandbox (templates are code from strangers)."""

from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here its body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str):
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """Messages -> the prompt text of a chat model, with the conventions of Hugging Face's templates."""

    def __init__(self, template: str, special_tokens: dict[str, str], origin: str):
        """special_tokens: what the template may name, e.g. {"bos_token": "<s>"}. ValueError if the template does not parse."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._origin, self._special_tokens = origin, special_tokens
        try:
            self._template = environment.from_string(template)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{origin}: the chat template is not valid: {error}") from None

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """messages: [{"role": "user", "content": "..."}, ...]. ValueError for anything else, and where the template itself refuses."""
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"messages must be a non-empty list of {{'role', 'content'}}, got {messages!r:.80}")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ValueError(f"messages[{i}] must be a dict with the strings 'role' and 'content', got {message!r:.80}")
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens)
        except Exception as error:  # a template may fail in any way Python can
            raise ValueError(f"{self._origin}: the chat template refuses these messages: {error}") from None
