"""MiniInfer: an LLM inference engine in JAX. `from miniinfer_jax import LLM, SamplingParams`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniinfer_jax.llm import LLM
    from miniinfer_jax.outputs import CompletionOutput, RequestOutput
    from miniinfer_jax.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "miniinfer_jax.llm",
    "CompletionOutput": "miniinfer_jax.outputs",
    "RequestOutput": "miniinfer_jax.outputs",
    "SamplingParams": "miniinfer_jax.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `miniinfer --help` and the scheduler's tests never load jax."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
