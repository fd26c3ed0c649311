"""Attention over the paged cache behind one interface; the backends are the rows of `BACKENDS`.

A backend is two functions over arrays: `prefill` for a ragged batch of chunks, `decode` for one token a
sequence. Letters: T tokens, N query heads, H head dim.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from miniinfer_jax.batch import DecodeInputs, PrefillInputs
from miniinfer_jax.config import ConfigError, ModelConfig
from miniinfer_jax.ops.attention_cudnn import cudnn_unsupported, prefill_cudnn
from miniinfer_jax.ops.attention_kernels import decode_kernel, kernels_unsupported, prefill_kernel
from miniinfer_jax.ops.attention_reference import ALL_ROWS, Tile, decode_reference, prefill_reference
from miniinfer_jax.ops.linear import PLAIN, Products
from miniinfer_jax.ops.linear_kernels import KERNELS

logger = logging.getLogger(__name__)

Device = Any  # a jax.Device, which is a value to type checkers
PrefillAttention = Callable[[jax.Array, jax.Array, PrefillInputs, int | None], jax.Array]
DecodeAttention = Callable[[jax.Array, jax.Array, DecodeInputs, int | None], jax.Array]


class AttentionBackend(NamedTuple):
    """Both functions take (queries, pages of the layer, inputs, window) and return an array of the queries' shape."""

    name: str
    prefill: PrefillAttention
    decode: DecodeAttention
    # Why a model in a dtype, with a page size, can't run on a device; None if it can.
    unsupported: Callable[[ModelConfig, str, int, Device], str | None] = lambda *_: None
    products: Products = PLAIN  # of a decode step's layers: the matrix products around the attention


def attention(
    queries: jax.Array,
    pages: jax.Array,
    inputs: PrefillInputs | DecodeInputs,
    window: int | None,
    backend: AttentionBackend,
) -> jax.Array:
    """Causal attention of queries [T, N, H] over their sequences' pages -> [T, N, H], scaled by 1 / sqrt(H).

    A query at position p sees keys at positions (p - window, p], or [0, p] without a window.
    """
    if isinstance(inputs, PrefillInputs):
        return backend.prefill(queries, pages, inputs, window)
    return backend.decode(queries, pages, inputs, window)


def _reference(name: str, tile: Tile) -> AttentionBackend:
    return AttentionBackend(name, partial(prefill_reference, tile), partial(decode_reference, tile))


BACKENDS: dict[str, AttentionBackend] = {
    "pallas": AttentionBackend("pallas", prefill_kernel, decode_kernel, kernels_unsupported, KERNELS),
    "cudnn": AttentionBackend("cudnn", prefill_cudnn, decode_kernel, cudnn_unsupported, KERNELS),
    "xla": _reference("xla", ALL_ROWS),
    # Few at a time: what is gathered stays in a core's cache, and short rows do not wait for long ones.
    "xla-tiled": _reference("xla-tiled", Tile(num_rows=8, num_keys=64)),
}
PREFERRED = {"cpu": ("xla-tiled",), "gpu": ("pallas", "xla")}  # by platform, what was measured faster first


def choose_backend(name: str, model: ModelConfig, dtype: str, page_size: int, device: Device) -> AttentionBackend:
    """The backend called `name`; "auto" is the first of the platform's that runs the model, logged.

    Raises ConfigError for an unknown one, and for one that can't run the model here, with the reason and the others.
    """
    reasons = {key: backend.unsupported(model, dtype, page_size, device) for key, backend in BACKENDS.items()}
    usable = [key for key, reason in reasons.items() if reason is None]
    if name == "auto":
        chosen = next(key for key in PREFERRED.get(device.platform, ("xla",)) if key in usable)
        logger.info("attention backend: %s", chosen)
        return BACKENDS[chosen]
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} is not known; known: auto, {', '.join(BACKENDS)}")
    if name not in usable:
        raise ConfigError(f"attention backend {name!r} can't run this: {reasons[name]}; use auto, {', '.join(usable)}")
    return BACKENDS[name]
