"""Prompt files: JSON lines with ``category`` and ``turns`` (the first is asked) or ``prompt``. prompts.jsonl beside this file was written for the project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specrt.checks import json_object
from specrt.cli.options import read_text

BUILT_IN = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    id: str
    category: str
    text: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]


def load_prompts(path: str | Path = BUILT_IN, categories: list[str] | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, of the given categories, at most ``limit`` a category. ValueError names the file, the line and what is wrong."""
    prompts: list[Prompt] = []
    count: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        prompt = _parse(line, f"{path}:{number}")
        count[prompt.category] = count.get(prompt.category, 0) + 1
        if (not categories or prompt.category in categories) and (limit is None or count[prompt.category] <= limit):
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no prompts" + (f" of the categories {categories}; it has {sorted(count)}" if categories else ""))
    return prompts


def _parse(line: str, where: str) -> Prompt:
    row = json_object(line, where)
    turns = row.get("turns", [row.get("prompt")])
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str) or not turns[0]:
        raise ValueError(f"{where}: 'turns' (a list of texts) or 'prompt' (a text) is expected, got {turns!r}")
    return Prompt(str(row.get("id", where)), str(row.get("category", "all")), turns[0])
