"""Attention by Pallas kernels for Hopper GPUs."""

from typing import Any

import jax

from miniinfer_jax.batch import DecodeInputs
from miniinfer_jax.config import ModelConfig

HOPPER = 9.0  # compute capability: the kernels use its tensor memory accelerator and warpgroup products


def decode_kernel(queries: jax.Array, pages: jax.Array, inputs: DecodeInputs, window: int | None) -> jax.Array:
    """Each query [B, N, H] over its sequence's pages."""
    # Imported where it is traced: no other backend waits for Pallas.
    from miniinfer_jax.pallas_kernels.paged_decode import paged_decode_attention

    return paged_decode_attention(queries, pages, inputs.page_table, inputs.context_lens, window=window)


def decode_kernel_unsupported(model: ModelConfig, dtype: str, page_size: int, device: Any) -> str | None:
    """Why the kernels can't run a model here, with the values that they allow; None if they can."""
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or float(capability or 0) != HOPPER:
        found = f"compute capability {capability}" if capability else f"a {device.platform}"
        return f"it needs a Hopper GPU (compute capability {HOPPER}), this is {found}"
    from miniinfer_jax.pallas_kernels.paged_decode import unsupported

    return unsupported(model.head_dim, page_size, model.num_heads, model.num_kv_heads, dtype)
