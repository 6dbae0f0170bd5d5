"""TensorSource: the tensors of a checkpoint by their Hugging Face names, read one at a time."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class TensorSource(Protocol):
    """Headers are cheap (``names``, ``shape``, ``dtype``, ``storage``); ``get`` reads the data and checks nothing again."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype | None:
        """What ``get`` returns: a torch dtype, None for one that torch does not have."""

    def storage(self, name: str) -> str:
        """How the file stores the tensor ("BF16", "Q4_K", ...)."""

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU. ValueError if its bytes cannot be read."""
