"""The host's memory, before buffers are made that it cannot hold. torch asks for address space and Linux gives it: without a look the process is killed later, or dies in an allocator."""

from __future__ import annotations

import re
from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def available_memory() -> int | None:
    """Bytes that new buffers may take; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return None if found is None else 1024 * int(found[1])


def check_memory(max_batch_size: int, max_model_len: int, kv_cache_memory: int | None, cache: int, logits: int) -> None:
    """cache: bytes of all pages; logits: of the round's buffers as wide as the vocabulary. What else a round has is small beside them, a drafter's logits apart: hence "at least"."""
    there = available_memory()
    if there is not None and cache + logits > there:
        raise ValueError(f"max_batch_size = {max_batch_size}, max_model_len = {max_model_len} and kv_cache_memory = {kv_cache_memory} take at least {_gb(cache + logits)} of memory "
                         f"({_gb(cache)} for keys and values, {_gb(logits)} for logits), and {_gb(there)} are available; lower max_batch_size or max_model_len, or give "
                         "kv_cache_memory in bytes, with which requests wait for pages")


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
