"""Seeds of requests and of their samples."""

from __future__ import annotations

import secrets

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def signed(word: int) -> int:
    """A 64-bit word as the signed integer with its bits."""
    word &= _MASK
    return word - 2**64 if word >> 63 else word


def draw_seed() -> int:
    return secrets.randbits(63)


def sample_seed(seed: int, i: int) -> int:
    """Seed of the i-th of n samples: the seed itself for i = 0, else splitmix64 (Steele, Lea, Flood 2014) of the i-th state after it."""
    if i == 0:
        return seed
    z = (seed + i * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return signed(z ^ (z >> 31))
