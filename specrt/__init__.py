"""specrt: an exact speculative-decoding runtime for large language models."""

import os
from typing import TYPE_CHECKING, Any

# How many turns a thread of the CPU's kernels waits before it sleeps. libgomp's own 300,000 are longer than any kernel: beside one other busy process decoding becomes many times slower,
# as those who wait keep off the core who has work to do. It is read when torch is loaded, so a program that imports torch first sets it by itself.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from specrt.llm import LLM
    from specrt.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that SamplingParams needs neither torch nor the compiled extension."""
    if name == "LLM":
        from specrt.llm import LLM

        return LLM
    if name == "SamplingParams":
        from specrt.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'specrt' has no attribute {name!r}")
