"""The matrix products of the models by a Pallas kernel for Hopper GPUs, where it was measured to be faster."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from miniinfer_jax.ops.linear import Norm, Products, gated_linear, linear

MAX_ROWS = 8  # up to here steps were measured to be faster (benchmarks/skinny_linear_variants.md)


def is_faster(num_rows: int, input_size: int, output_size: int, dtype: Any, num_weights: int = 1) -> bool:
    """Whether the kernel takes these sizes, and is the faster one."""
    # Imported where it is traced: no other backend waits for Pallas.
    from miniinfer_jax.pallas_kernels.skinny_linear import unsupported

    return num_rows <= MAX_ROWS and unsupported(num_rows, input_size, output_size, dtype, num_weights) is None


def linear_kernel(
    inputs: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    num_input_axes: int = 1,
    output_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `linear`."""
    num_rows, output_shape = inputs.shape[0], weight.shape[: weight.ndim - num_input_axes]
    input_size, output_size = math.prod(inputs.shape[1:]), math.prod(output_shape)
    if not is_faster(num_rows, input_size, output_size, weight.dtype):
        return linear(
            inputs,
            weight,
            bias,
            norm=norm,
            residual=residual,
            num_input_axes=num_input_axes,
            output_dtype=output_dtype,
        )
    from miniinfer_jax.pallas_kernels.skinny_linear import skinny_linear

    output = skinny_linear(
        inputs.reshape(num_rows, input_size),
        weight.reshape(output_size, input_size),
        norm=norm,
        bias=None if bias is None else bias.reshape(output_size),
        residual=None if residual is None else residual.reshape(num_rows, output_size),
        output_dtype=output_dtype,
        interpret=interpret,
    )
    return output.reshape(num_rows, *output_shape)


def gated_linear_kernel(
    inputs: jax.Array, weight: jax.Array, activation: str, *, norm: Norm | None = None, interpret: bool = False
) -> jax.Array:
    """As `gated_linear`."""
    _, output_size, input_size = weight.shape
    if activation != "silu" or not is_faster(inputs.shape[0], input_size, output_size, weight.dtype, num_weights=2):
        return gated_linear(inputs, weight, activation, norm=norm)
    from miniinfer_jax.pallas_kernels.skinny_linear import skinny_gated_linear

    return skinny_gated_linear(inputs, weight, norm=norm, interpret=interpret)


KERNELS = Products(linear_kernel, gated_linear_kernel)
