"""Cases and plain-Python twins for the tree ops: random trees, page tables, and the float32 functions and noise of csrc/base, bit for bit."""

import random

import numpy as np
import torch

F32 = np.float32
POISON = -77777


def ints(values, device, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def random_trees(rng: random.Random, batch: int, nodes: int, vocab: int = 6, sizes=None):
    """token, parent [B][N] and size [B]; siblings distinct where the vocabulary allows, sizes 0 .. N, poison past the size."""
    token, parent, size = [[POISON] * nodes for _ in range(batch)], [[POISON] * nodes for _ in range(batch)], []
    for b in range(batch):
        n = sizes[b] if sizes else rng.choice([0, 1, nodes, rng.randint(1, nodes)])
        taken = set()
        for i in range(n):
            while True:
                up, t = (rng.randrange(max(0, i - 5), i) if i else -1), rng.randrange(vocab)
                if (up, t) not in taken:
                    break
            taken.add((up, t))
            token[b][i], parent[b][i] = t, up
        size.append(n)
    return token, parent, size


def random_table(rng: random.Random, batch: int, max_pages: int):
    pages = list(range(batch * max_pages))
    rng.shuffle(pages)
    return [pages[b * max_pages : (b + 1) * max_pages] for b in range(batch)]


def slot_of(table_row, page_size: int, logical: int) -> int:
    index = logical // page_size
    return table_row[index] * page_size + logical % page_size if index < len(table_row) and table_row[index] >= 0 else -1


# ---- base/math.h and base/noise.h. A product of two float32 is exact in float64, so fma rounds but for a second rounding too rare to meet here.


def fma(a, b, c):
    return F32(np.float64(a) * np.float64(b) + np.float64(c))


def _polynomial(coefficients, f):
    p = F32(coefficients[0])
    for c in coefficients[1:]:
        p = fma(p, f, F32(c))
    return p


def exp32(x):
    x = F32(F32(x) * F32(1.44269504088896340736))
    if x < -126:
        return F32(0)
    x = min(x, F32(127.999))
    n = F32(F32(x + F32(12582912.0)) - F32(12582912.0))
    f = F32(x - n)
    p = _polynomial([1.5252734e-5, 1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0], f)
    return F32(np.ldexp(np.float64(p), int(n)))


def _log_reduced(f, e):
    z = F32(f * f)
    p = _polynomial([7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
                     -2.4999993993e-1, 3.3333331174e-1], f)
    y = F32(F32(f * z) * p)
    y = fma(e, F32(-2.12194440e-4), y)
    y = fma(F32(-0.5), z, y)
    return fma(e, F32(0.693359375), F32(f + y))


def log32(x):
    x = F32(x)
    m, e = np.frexp(x)
    if m < F32(0.707106781186547524):
        return _log_reduced(F32(F32(m + m) - F32(1)), F32(e - 1))
    return _log_reduced(F32(m - F32(1)), F32(e))


def _log1p32(x):
    near = F32(F32(1) + F32(x))  # in [sqrt(1/2), sqrt(2)) it needs no reduction, and x itself is the exact argument
    return _log_reduced(F32(x), F32(0)) if F32(0.707106781186547524) <= near < F32(1.41421356) else log32(near)


def noise_word(seed: int, position: int, index: int, purpose: int) -> int:
    key, c = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], [index >> 2, position, purpose, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[index & 3]


def gumbel(seed: int, position: int, token: int, purpose: int):
    w = F32(F32(F32(noise_word(seed, position, token, purpose)) + F32(0.5)) * F32(2.0**-32))
    return F32(-log32(F32(-_log1p32(F32(-w)))))


def coin(seed: int, position: int, index: int, purpose: int):
    return F32((noise_word(seed, position, index, purpose) >> 8) * 2.0**-24)
