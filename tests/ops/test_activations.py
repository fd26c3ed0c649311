"""Activations against their definitions in float64, and against torch where it is installed."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.config import ACTIVATIONS
from miniinfer_jax.ops.activations import ACTIVATION_FUNCTIONS, leaky_relu

INPUTS = np.concatenate([np.linspace(-12, 12, 97), [-90.0, 90.0, -0.0, 1e-30]])

erf = np.vectorize(math.erf)
DEFINITIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
TOLERANCES = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}


def test_every_activation_that_a_config_may_name_is_there():
    assert set(ACTIVATION_FUNCTIONS) == set(ACTIVATIONS) == set(DEFINITIONS)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_definition(name, dtype):
    inputs = jnp.asarray(INPUTS, dtype)
    outputs = ACTIVATION_FUNCTIONS[name](inputs)
    assert outputs.dtype == inputs.dtype and outputs.shape == inputs.shape
    expected = DEFINITIONS[name](np.asarray(inputs, np.float64))
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(np.asarray(outputs, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_torch_agrees(name):
    torch = pytest.importorskip("torch")
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "leaky_relu": torch.nn.functional.leaky_relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    inputs = INPUTS.astype(np.float32)
    expected = functions[name](torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(ACTIVATION_FUNCTIONS[name](jnp.asarray(inputs)), expected, rtol=2e-6, atol=2e-6)


def test_the_slope_of_leaky_relu_can_be_given():
    np.testing.assert_allclose(leaky_relu(jnp.asarray([-2.0, 3.0]), 0.25), [-0.5, 3.0])
