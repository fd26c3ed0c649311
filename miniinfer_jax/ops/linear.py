"""The matrix products of the models, with what stands around them: weights are stored output axes first."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from miniinfer_jax.ops.activations import ACTIVATION_FUNCTIONS
from miniinfer_jax.ops.norms import rms_norm

Norm = tuple[jax.Array, float]  # weight [D] and epsilon of an RMS norm


def linear(
    inputs: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    num_input_axes: int = 1,
    output_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """residual [T, O...] + (norm(inputs [T, I...]) @ weight [O..., I...] + bias [O...]) -> [T, O...].

    Accumulated in float32. `num_input_axes` axes are summed over: 1 for [N, H, D] projections of [T, D], 2 for
    [D, N, H] of [T, N, H].
    """
    output_shape = weight.shape[: weight.ndim - num_input_axes]
    input_size = math.prod(weight.shape[weight.ndim - num_input_axes :])
    # float32 means float32: without HIGHEST, XLA may round the operands to tf32 on a GPU.
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    normalized = inputs if norm is None else rms_norm(inputs, *norm)
    output = lax.dot_general(
        normalized.reshape(inputs.shape[0], input_size),
        weight.reshape(-1, input_size),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=output_dtype or inputs.dtype,
    ).reshape(inputs.shape[0], *output_shape)
    output = output if bias is None else output + bias
    return output if residual is None else residual + output


def gated_linear(inputs: jax.Array, weight: jax.Array, activation: str, *, norm: Norm | None = None) -> jax.Array:
    """activation(gate) * up of gate, up = norm(inputs [T, D]) @ weight [2, F, D] -> [T, F].

    https://arxiv.org/abs/2002.05202; activation is one of `config.ACTIVATIONS`.
    """
    gate_up = linear(inputs, weight, norm=norm)  # [T, 2, F]
    return ACTIVATION_FUNCTIONS[activation](gate_up[:, 0]) * gate_up[:, 1]


class Products(NamedTuple):
    """An implementation of both, with their signatures."""

    linear: Callable[..., jax.Array]
    gated_linear: Callable[..., jax.Array]


PLAIN = Products(linear, gated_linear)
