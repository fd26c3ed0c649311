"""Normalization over the last axis; statistics in float32, the result in the dtype that came in."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float, is_normed: jax.Array | bool = True) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * weight [D], https://arxiv.org/abs/1910.07467.

    Rows where is_normed [..., 1] is False are weighted only.
    """
    values = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + epsilon)
    if is_normed is not True:
        scale = jnp.where(is_normed, scale, 1.0)
    return (values * scale).astype(x.dtype) * weight


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * weight [D] + bias [D], https://arxiv.org/abs/1607.06450."""
    values = x.astype(jnp.float32)
    centered = values - jnp.mean(values, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + epsilon)
    normalized = (centered * scale).astype(x.dtype) * weight
    return normalized if bias is None else normalized + bias
