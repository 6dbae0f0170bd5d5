"""Comparisons used by every test: relative norms against a float64 reference, and bits."""

import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; inf where got has a NaN that want has not."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"shapes differ: {tuple(got.shape)} and {tuple(want.shape)}"
    if torch.isnan(got).any():
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = relative_error(got, want)
    assert error <= tolerance, f"relative error {error:.3e} > {tolerance:.1e}"


def assert_bits(got: Tensor, want: Tensor) -> None:
    """Equality of every bit (NaN equals the same NaN, -0 differs from 0)."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}[got.element_size()]
    differing = (got.cpu().contiguous().view(ints) != want.cpu().contiguous().view(ints)).sum().item()
    assert differing == 0, f"{differing} of {got.numel()} elements differ in their bits"


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """An output buffer full of NaN (or of an absurd integer), so that an element nobody wrote shows."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.full(shape, -77777 if dtype != torch.uint8 else 255, dtype=dtype, device=device)


def rows(n: int, device: str) -> Tensor:
    """The ``num_rows`` argument of the ops."""
    return torch.tensor([n], dtype=torch.int32, device=device)
