"""The one matrix product of the models: weights are stored output axes first, input axes last."""

import math

import jax
import jax.numpy as jnp
from jax import lax


def linear(
    inputs: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    num_input_axes: int = 1,
    output_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """inputs [T, I...] @ weight [O..., I...] + bias [O...] -> [T, O...]; accumulated in float32.

    `num_input_axes` axes are summed over: 1 for [N, H, D] projections of [T, D], 2 for [D, N, H] of [T, N, H].
    """
    output_shape = weight.shape[: weight.ndim - num_input_axes]
    input_size = math.prod(weight.shape[weight.ndim - num_input_axes :])
    # float32 means float32: without HIGHEST, XLA may round the operands to tf32 on a GPU.
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    output = lax.dot_general(
        inputs.reshape(inputs.shape[0], input_size),
        weight.reshape(-1, input_size),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=output_dtype or inputs.dtype,
    ).reshape(inputs.shape[0], *output_shape)
    return output if bias is None else output + bias
