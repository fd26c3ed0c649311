"""Attention by Pallas kernels for Hopper GPUs."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax

from miniinfer_jax.batch import DecodeInputs, PrefillInputs
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.ops.attention_reference import ALL_ROWS, prefill_reference

# The kernels are imported where they are traced: no other backend waits for Pallas.

HOPPER = 9.0  # compute capability: the kernels use its tensor memory accelerator and warpgroup products


def decode_kernel(queries: jax.Array, pages: jax.Array, inputs: DecodeInputs, window: int | None) -> jax.Array:
    """Each query [B, N, H] over its sequence's pages."""
    from miniinfer_jax.pallas_kernels.paged_decode import paged_decode_attention

    return paged_decode_attention(queries, pages, inputs.page_table, inputs.context_lens, window=window)


def prefill_kernel(
    queries: jax.Array, pages: jax.Array, inputs: PrefillInputs, window: int | None, interpret: bool = False
) -> jax.Array:
    """Each query [T, N, H] over its sequence's pages; its gradients are those of the definition."""
    attended: Any = _prefill(queries, pages, inputs, window, interpret)
    return attended


_Saved = tuple[jax.Array, jax.Array, PrefillInputs]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _prefill(
    queries: jax.Array, pages: jax.Array, inputs: PrefillInputs, window: int | None, interpret: bool
) -> jax.Array:
    from miniinfer_jax.pallas_kernels.flash_prefill import flash_prefill_attention

    chunks = (inputs.page_table, inputs.query_starts, inputs.context_lens)
    return flash_prefill_attention(queries, pages, *chunks, window=window, interpret=interpret)


def _prefill_forward(
    queries: jax.Array, pages: jax.Array, inputs: PrefillInputs, window: int | None, interpret: bool
) -> tuple[jax.Array, _Saved]:
    return prefill_kernel(queries, pages, inputs, window, interpret), (queries, pages, inputs)


def _prefill_backward(
    window: int | None, interpret: bool, saved: _Saved, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    """Gradients of queries and pages: the definition once more, in plain XLA, and backward through it."""
    queries, pages, inputs = saved
    differentiable = replace(inputs, stops_early=False)

    def attend(queries: jax.Array, pages: jax.Array) -> jax.Array:
        return prefill_reference(ALL_ROWS, queries, pages, differentiable, window)

    return *jax.vjp(attend, queries, pages)[1](gradient), None


_prefill.defvjp(_prefill_forward, _prefill_backward)


def kernels_unsupported(model: ModelConfig, dtype: str, page_size: int, device: Any) -> str | None:
    """Why the kernels can't run a model here, with the values that they allow; None if they can."""
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or float(capability or 0) != HOPPER:
        found = f"compute capability {capability}" if capability else f"a {device.platform}"
        return f"it needs a Hopper GPU (compute capability {HOPPER}), this is {found}"
    from miniinfer_jax.pallas_kernels import flash_prefill, paged_decode

    shapes = (model.head_dim, page_size, model.num_heads, model.num_kv_heads, dtype)
    return paged_decode.unsupported(*shapes) or flash_prefill.unsupported(*shapes)
