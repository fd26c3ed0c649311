"""Activation functions by the names of `config.ACTIVATIONS`; each maps an array to one of the same shape and dtype."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x), https://arxiv.org/abs/1702.03118."""
    return jax.nn.silu(x)


def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) by the error function, https://arxiv.org/abs/1606.08415."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU's tanh approximation, section 2 of https://arxiv.org/abs/1606.08415."""
    return jax.nn.gelu(x, approximate=True)


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0)."""
    return jnp.maximum(x, 0)


def leaky_relu(x: jax.Array, negative_slope: float = 0.01) -> jax.Array:
    """x where x >= 0, negative_slope * x elsewhere."""
    return jnp.where(x >= 0, x, negative_slope * x)


def tanh(x: jax.Array) -> jax.Array:
    """Hyperbolic tangent."""
    return jnp.tanh(x)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x))."""
    return jax.nn.sigmoid(x)


ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "leaky_relu": leaky_relu,
    "tanh": tanh,
    "sigmoid": sigmoid,
}
