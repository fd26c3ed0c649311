"""Attention by the Pallas kernels for Hopper GPUs; gradients are those of the plain-XLA definition."""

from functools import partial
from typing import Any

import jax

from miniinfer_jax.batch import DecodeInputs, PrefillInputs
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.ops.attention_reference import Tile, prefill_reference

HOPPER = 9.0  # compute capability: the kernels use its tensor memory accelerator and warpgroup products
BACKWARD_TILE = Tile(num_rows=2**30, num_keys=256)


def decode_kernel(queries: jax.Array, pages: jax.Array, inputs: DecodeInputs, window: int | None) -> jax.Array:
    """Each query [B, N, H] over its sequence's pages."""
    # The kernels are imported where they are traced: no other backend waits for Pallas.
    from miniinfer_jax.pallas_kernels.paged_decode import paged_decode_attention

    return paged_decode_attention(queries, pages, inputs.page_table, inputs.context_lens, window=window)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def prefill_kernel(queries: jax.Array, pages: jax.Array, inputs: PrefillInputs, window: int | None) -> jax.Array:
    """Each query [T, N, H] of a ragged batch of chunks over its sequence's pages."""
    from miniinfer_jax.pallas_kernels.flash_prefill import flash_prefill_attention

    return flash_prefill_attention(
        queries, pages, inputs.page_table, inputs.query_starts, inputs.context_lens, window=window
    )


def _prefill_forward(
    queries: jax.Array, pages: jax.Array, inputs: PrefillInputs, window: int | None
) -> tuple[jax.Array, Any]:
    return prefill_kernel(queries, pages, inputs, window), (queries, pages, inputs)


def _prefill_backward(window: int | None, residuals: Any, gradient: jax.Array) -> tuple[Any, ...]:
    queries, pages, inputs = residuals
    differentiable = inputs.replace(stops_early=False)
    _, pull_back = jax.vjp(
        lambda queries, pages: prefill_reference(BACKWARD_TILE, queries, pages, differentiable, window), queries, pages
    )
    return (*pull_back(gradient), None)


prefill_kernel.defvjp(_prefill_forward, _prefill_backward)


def kernel_unsupported(model: ModelConfig, dtype: str, page_size: int, device: Any) -> str | None:
    """Why the kernels can't run a model here, with the values that they allow; None if they can."""
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or float(capability or 0) != HOPPER:
        found = f"compute capability {capability}" if capability else f"a {device.platform}"
        return f"it needs a Hopper GPU (compute capability {HOPPER}), this is {found}"
    from miniinfer_jax.pallas_kernels import flash_prefill, paged_decode

    sizes = (model.head_dim, page_size, model.num_heads, model.num_kv_heads, dtype)
    return paged_decode.unsupported(*sizes) or flash_prefill.unsupported(*sizes)
