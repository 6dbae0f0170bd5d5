"""specrt: an exact speculative-decoding runtime for large language models."""

from typing import TYPE_CHECKING, Any

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
