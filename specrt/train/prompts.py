"""Prompts from JSON lines, as a server's log or a data set has them: ``prompt`` (a text), ``turns`` (what a user says, one after the other) or ``messages`` (a chat up to
the answer that is wanted). ``category`` or ``source`` says what kind it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specrt.checks import json_object

_FORMS = "'prompt' (a text), 'turns' (a list of texts) or 'messages' (a list of {'role', 'content'}, ending with the user)"


@dataclass(frozen=True)
class Conversation:
    """history: messages before the first turn; turns: what the user says, each after the model's answer to the one before."""

    id: str
    category: str
    history: tuple[dict[str, str], ...]
    turns: tuple[str, ...]


def read_conversations(path: str | Path, categories: list[str] | None = None, without: list[str] | None = None, limit: int | None = None) -> list[Conversation]:
    """Those of ``categories`` (None: all) but not of ``without``, at most ``limit`` of each. ValueError names the file, the line and what is wrong."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    found: list[Conversation] = []
    count: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        one = _conversation(line, f"{path}:{number}", number)
        count[one.category] = count.get(one.category, 0) + 1
        if (categories is None or one.category in categories) and one.category not in (without or ()) and (limit is None or count[one.category] <= limit):
            found.append(one)
    for name in (*(categories or ()), *(without or ())):
        if name not in count:
            raise ValueError(f"{path} has no category {name!r}; it has {', '.join(map(repr, sorted(count))) or 'no prompts'}")
    if not found:
        raise ValueError(f"{path} has no prompts" + (" of these categories" if count else ""))
    return found


def _conversation(line: str, where: str, number: int) -> Conversation:
    row = json_object(line, where)
    history: list[dict[str, str]] = []
    if "messages" in row:
        history = row["messages"]
        if not isinstance(history, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in history):
            raise ValueError(f"{where}: 'messages' must be a list of {{'role', 'content'}}, got {history!r:.100}")
        history = [{"role": m["role"], "content": m["content"]} for m in history]
        while history and history[-1]["role"] == "assistant":  # the answer of a log: the model's own takes its place
            history.pop()
        turns = [history.pop()["content"]] if history and history[-1]["role"] == "user" else None
    else:
        turns = row.get("turns", [row.get("prompt")])
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t for t in turns):
        raise ValueError(f"{where}: an object with {_FORMS} is expected")
    return Conversation(str(row.get("id", number)), str(row.get("category", row.get("source", "all"))), tuple(history), tuple(turns))
