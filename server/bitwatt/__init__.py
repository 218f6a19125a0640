"""bitwatt: an OpenAI-compatible server for ternary language models that measures what they save.

from bitwatt import LLM, SamplingParams, StructuredOutputsParams
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitwatt.constraints.structured_outputs import (
        StructuredOutputsParams as StructuredOutputsParams,
    )
    from bitwatt.llm import LLM as LLM
    from bitwatt.serving.sampling_params import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported when used: the API process needs neither, nor torch behind them.
    if name == "LLM":
        from bitwatt.llm import LLM

        return LLM
    if name == "SamplingParams":
        from bitwatt.serving.sampling_params import SamplingParams

        return SamplingParams
    if name == "StructuredOutputsParams":
        from bitwatt.constraints.structured_outputs import StructuredOutputsParams

        return StructuredOutputsParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
