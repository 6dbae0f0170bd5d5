"""Checks of what users pass in: each raises a ValueError that names the key, the value and what would be accepted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def refuse(key: str, value: Any, accepted: str) -> ValueError:
    """The error to raise; the value's repr is cut, it may be a whole prompt."""
    return ValueError(f"{key} = {value!r:.100} is not valid: it must be {accepted}")


def integer(key: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer (numpy's too, never a bool) in [low, high]."""
    accepted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low or (high is not None and value > high):
        raise refuse(key, value, accepted)
    return int(value)


def number(key: str, value: Any, low: float, high: float, accepted: str) -> float:
    """A finite number (never a bool) in [low, high]; ``accepted`` says so in words."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not low <= value <= high:
        raise refuse(key, value, accepted)
    return float(value)


def choice(key: str, value: Any, accepted: Iterable[Any]) -> Any:
    accepted = list(accepted)
    if not any(type(value) is type(a) and value == a for a in accepted):
        raise refuse(key, value, "one of " + ", ".join(repr(a) for a in accepted))
    return value


def boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise refuse(key, value, "True or False")
    return value


def known_keys(what: str, given: Iterable[Any], accepted: Iterable[str]) -> None:
    accepted = list(accepted)
    unknown = [key for key in given if key not in accepted]
    if unknown:
        raise ValueError(f"{what} has no key {unknown[0]!r}; it accepts {', '.join(accepted)}")


def json_object(line: str, where: str) -> dict[str, Any]:
    """A line of a JSONL file; ``where``: file and line, for the ValueError."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an object is expected, got {type(row).__name__}")
    return row
