"""Prefill attention by a library: cuDNN, through `jax.nn.dot_product_attention`.

cuDNN aligns its causal mask with the first key, so it serves whole fresh prompts alone. A step that holds anything else
(a later chunk, a cached prefix, a decoding sequence) is computed by the definition.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import PrefillInputs
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.ops.attention_kernels import kernels_unsupported
from miniinfer_jax.ops.attention_reference import ALL_ROWS, prefill_reference

MAX_HEAD_DIM = 128


def prefill_cudnn(
    queries: jax.Array,
    pages: jax.Array,
    inputs: PrefillInputs,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Each query [T, N, H] over its sequence's pages; where a gradient may be asked for, the definition."""
    if not inputs.stops_early:
        return prefill_reference(ALL_ROWS, queries, pages, inputs, window)
    return lax.cond(
        jnp.all(inputs.context_lens == jnp.diff(inputs.query_starts)),
        lambda: _fresh_prompts(queries, pages, inputs, window, implementation),
        lambda: prefill_reference(ALL_ROWS, queries, pages, inputs, window),
    )


def _fresh_prompts(
    queries: jax.Array,
    pages: jax.Array,
    inputs: PrefillInputs,
    window: int | None,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """Queries [T, N, H] of prompts that begin in this step, one prompt after the other."""
    num_tokens = queries.shape[0]
    page_size, _ = kv_cache.sizes(pages)
    num_pages = min(-(-num_tokens // page_size), inputs.page_table.shape[1])
    lengths = jnp.diff(inputs.query_starts)
    padded = jnp.pad(queries, ((0, num_tokens), (0, 0), (0, 0)))  # any prompt may take all T tokens from its start on

    def attend(row: jax.Array, attended: jax.Array) -> jax.Array:
        start, length = inputs.query_starts[row], lengths[row][None]
        keys_and_values = kv_cache.read(pages, inputs.page_table[row, :num_pages][None])  # [1, K, C, H]
        # Pages may still hold another sequence's values, and 0 * NaN is NaN.
        is_own = (jnp.arange(num_pages * page_size) < length)[:, None, None]
        keys, values = (jnp.where(is_own, jnp.swapaxes(part, 1, 2), 0) for part in keys_and_values)  # [1, C, K, H]
        prompt = jax.nn.dot_product_attention(
            lax.dynamic_slice_in_dim(padded, start, num_tokens)[None],
            keys,
            values,
            is_causal=True,
            query_seq_lengths=length,
            key_value_seq_lengths=length,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation,
        )[0]
        prompt = jnp.where((jnp.arange(num_tokens) < length)[:, None, None], prompt, 0)
        # What lies behind the prompt's end is written over by the next one.
        return lax.dynamic_update_slice_in_dim(attended, prompt, start, axis=0)

    attended = lax.fori_loop(0, jnp.sum(lengths > 0), attend, jnp.zeros_like(padded))
    return attended[:num_tokens]


def cudnn_unsupported(model: ModelConfig, dtype: str, page_size: int, device: Any) -> str | None:
    """Why cuDNN, with the kernels for decoding beside it, can't run a model here; None if it can."""
    if model.head_dim > MAX_HEAD_DIM:
        return f"head_dim {model.head_dim}: takes up to {MAX_HEAD_DIM}"
    return kernels_unsupported(model, dtype, page_size, device)
