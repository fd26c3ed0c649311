"""The matrix product of the models: any number of output and input axes, accumulated in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.ops.linear import linear


def random_array(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("inputs", "outputs", "num_input_axes"),
    [((12,), (7,), 1), ((12,), (4, 5), 1), ((12,), (2, 9), 1), ((4, 6), (10,), 2), ((1,), (1,), 1)],
)
def test_sums_over_the_last_axes_of_the_weight(inputs, outputs, num_input_axes, has_bias):
    x, weight = random_array("float32", 3, *inputs), random_array("float32", *outputs, *inputs, seed=1)
    bias = random_array("float32", *outputs, seed=2) if has_bias else None
    product = linear(x, weight, bias, num_input_axes=num_input_axes)
    expected = np.tensordot(
        np.asarray(x, np.float64),
        np.asarray(weight, np.float64),
        axes=(range(1, 1 + num_input_axes), range(len(outputs), len(outputs) + num_input_axes)),
    )
    expected = expected + np.asarray(bias, np.float64) if has_bias else expected
    assert product.shape == (3, *outputs)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_keeps_the_dtype_unless_another_is_asked_for(dtype):
    x, weight = random_array(dtype, 3, 256), random_array(dtype, 5, 256, seed=1)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert linear(x, weight).dtype == jnp.dtype(dtype)
    wide = linear(x, weight, output_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-4)  # far below what rounding to dtype would cost


def test_a_long_sum_of_small_parts_is_not_lost():
    """2,048 + 4,096 x 1: in a float16 or bfloat16 accumulator the ones would vanish."""
    x = jnp.ones((1, 4097), jnp.bfloat16).at[0, 0].set(2048)
    assert linear(x, jnp.ones((1, 4097), jnp.bfloat16), output_dtype=jnp.float32)[0, 0] == 6144
