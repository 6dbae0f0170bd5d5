"""The sampler's tables, the ops' calls, and NumPy models of the noise and of the transforms, for the tests of ``sample/``."""

import numpy as np
import torch
from torch import Tensor

from specrt import ops
from tests.kit.compare import poisoned, rows

DEFAULTS = dict(temperature=1.0, top_p=1.0, min_p=0.0, repetition=1.0, presence=0.0, frequency=0.0, top_k=0, min_tokens=0, prompt_len=0, has_bias=0, has_penalty=0)
FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
INTS = ("top_k", "min_tokens", "prompt_len", "has_bias", "has_penalty")


def tables(params: list[dict], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """sampling_f [B, 6], sampling_i [B, 5] of a list of parameters (missing ones: no effect, temperature 1)."""
    full = [{**DEFAULTS, **p} for p in params]
    f = torch.tensor([[p[name] for name in FLOATS] for p in full], dtype=torch.float32, device=device)
    i = torch.tensor([[p[name] for name in INTS] for p in full], dtype=torch.int32, device=device)
    return f, i


def ints(values, device: str = "cpu", dtype=torch.int32) -> Tensor:
    return torch.as_tensor(values, dtype=dtype, device=device).contiguous()


def transform(logits: Tensor, params: list[dict], row_request=None, row_position=None, row_node=None, tree_token=None, tree_ancestors=None, stop_ids=None, bias=None,
              output_count=None, prompt_mask=None, mask=None, row_mask=None, num_rows=None, seeds=None, token=None, keep=True) -> tuple[Tensor, Tensor]:
    """``ops.sample_transform`` on a copy of ``logits``, with neutral defaults; ``mask`` is a bool table [masks, V]. Returns (z, status)."""
    device, (R, V), B = logits.device.type, logits.shape, len(params)
    z, status = logits.clone(), poisoned(R, dtype=torch.int32, device=device)
    f, i = tables(params, device)
    zeros = lambda *s, dtype: torch.zeros(*s, dtype=dtype, device=device)  # noqa: E731
    ops.sample_transform(
        z, ints(np.zeros(R) if row_request is None else row_request, device), ints(np.zeros(R) if row_position is None else row_position, device),
        None if row_node is None else ints(row_node, device), None if tree_token is None else ints(tree_token, device),
        None if tree_ancestors is None else ints(tree_ancestors, device, torch.int64), f, i,
        torch.full((B, 1), -1, dtype=torch.int32, device=device) if stop_ids is None else ints(stop_ids, device),
        zeros(B, V, dtype=torch.float32) if bias is None else bias.to(device), zeros(B, V, dtype=torch.int32) if output_count is None else ints(output_count, device),
        zeros(B, V, dtype=torch.uint8) if prompt_mask is None else ints(prompt_mask, device, torch.uint8),
        None if mask is None else pack_mask(mask).to(device), None if row_mask is None else ints(row_mask, device), rows(R if num_rows is None else num_rows, device), status,
        None if seeds is None else ints(seeds, device, torch.int64), token, keep)
    return z, status


def pack_mask(mask: Tensor) -> Tensor:
    """bool [masks, V] -> int32 [masks, ceil(V/32)], bit v % 32 of word v // 32."""
    padded = np.zeros((mask.shape[0], (mask.shape[1] + 31) // 32 * 32), dtype=np.uint8)
    padded[:, : mask.shape[1]] = mask.numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())


def exact(z: Tensor, seeds, positions, temperature=1.0, row_request=None) -> Tensor:
    """``ops.sample_exact``: tokens of positions ``positions`` + 1. One seed and temperature a slot; by default row r is slot r (or all are slot 0)."""
    device, R, B = z.device.type, z.shape[0], len(seeds)
    f = tables([{}], device)[0].repeat(B, 1)
    f[:, ops.TEMPERATURE] = torch.as_tensor(temperature, dtype=torch.float32)
    token = poisoned(R, dtype=torch.int32, device=device)
    request = (np.arange(R) if B == R else np.zeros(R)) if row_request is None else row_request
    ops.sample_exact(z, ints(request, device), ints(positions, device), ints(seeds, device, torch.int64), f, rows(R, device), token)
    return token


def topk(z: Tensor, seeds, positions, k: int, noise: int, temperature=1.0) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.draft_topk``: (token [R, k], score [R, k], perturbed [R, V])."""
    device, (R, V), B = z.device.type, z.shape, len(seeds)
    f = tables([{}], device)[0].repeat(B, 1)
    f[:, ops.TEMPERATURE] = torch.as_tensor(temperature, dtype=torch.float32)
    token, score = poisoned(R, k, dtype=torch.int32, device=device), poisoned(R, k, dtype=torch.float32, device=device)
    perturbed = poisoned(R, V, dtype=torch.float32, device=device)
    ops.draft_topk(z, ints(np.arange(R) if B == R else np.zeros(R), device), ints(positions, device), ints(seeds, device, torch.int64), f, noise, rows(R, device),
                   perturbed, token, score)
    return token, score, perturbed


def rejection(z: Tensor, token, parent, size, q: Tensor, q_levels, seeds, seq_lens, temperature=1.0, status=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ops.accept_rejection`` on trees of one width N: rows of slot b are b * N .. b * N + N - 1. Returns (path, path_len, emitted, error)."""
    device, token = z.device.type, ints(token)
    B, N = token.shape
    f = tables([{}], device)[0].repeat(B, 1)
    f[:, ops.TEMPERATURE] = torch.as_tensor(temperature, dtype=torch.float32)
    path, emitted = (poisoned(B, N, dtype=torch.int32, device=device) for _ in range(2))
    path_len, error = (poisoned(B, dtype=torch.int32, device=device) for _ in range(2))
    ops.accept_rejection(z, ints(np.zeros(B * N) if status is None else status, device), ints(np.arange(B + 1) * N, device), token.to(device), ints(parent, device),
                         ints(size, device), ints(seq_lens, device), q, ints(q_levels, device), ints(seeds, device, torch.int64), f,
                         poisoned(B, 2, z.shape[1], dtype=torch.float32, device=device), path, path_len, emitted, error)
    return path, path_len, emitted, error


def philox_words(seed: int, position: int, tokens: np.ndarray, purpose: int) -> np.ndarray:
    """The 32-bit noise words of csrc/README.md, item 7."""
    tokens = np.asarray(tokens, dtype=np.uint64)
    low32 = np.uint64(0xFFFFFFFF)
    c = [tokens >> np.uint64(2), np.full_like(tokens, position), np.full_like(tokens, purpose), np.zeros_like(tokens)]
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & low32, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & low32]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.choose((tokens & np.uint64(3)).astype(int), c).astype(np.uint32)


def gumbel64(words: np.ndarray) -> np.ndarray:
    """-log(-log1p(-W)), W = (k + 1/2) 2^-32, in float64."""
    return -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32))


def reference_transform(x: np.ndarray, p: dict, count: np.ndarray, prompt: np.ndarray, bias: np.ndarray, allowed: np.ndarray, stops: list[int]) -> np.ndarray:
    """One row of sample_transform: the roundings of float32 where the op rounds, float64 for every threshold. ``stops`` are the ids suppressed at this row."""
    p = {**DEFAULTS, **p}
    f32 = lambda name: np.float32(p[name])  # noqa: E731
    x = x.astype(np.float32).copy()
    if p["has_penalty"]:
        seen = (count > 0) | (prompt > 0)
        x = np.where(seen, np.where(x > 0, x / f32("repetition"), x * f32("repetition")), x)
        x = x - f32("frequency") * count.astype(np.float32)
        x = x - np.where(count > 0, f32("presence"), np.float32(0))
    if p["has_bias"]:
        x = x + bias
    x[stops] = -np.inf
    x = np.where(allowed, x, np.float32(-np.inf))
    if p["temperature"] <= 0:
        return x
    x = x / f32("temperature")
    with np.errstate(invalid="ignore"):
        if 0 < p["top_k"] < x.size:
            x = np.where(x >= np.sort(x)[-p["top_k"]], x, np.float32(-np.inf))
        mass = np.exp(x.astype(np.float64) - x.max())
        if p["top_p"] < 1:
            values = np.unique(x)[::-1]
            sums = np.cumsum([mass[x == v].sum() for v in values])
            x = np.where(x >= values[np.searchsorted(sums, np.float64(f32("top_p")) * mass.sum())], x, np.float32(-np.inf))
        if p["min_p"] > 0:
            x = np.where(mass >= np.float64(f32("min_p")), x, np.float32(-np.inf))
    return x
