"""Norms against their definitions in float64, and against torch and transformers where they are installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.ops.norms import layer_norm, rms_norm

EPSILON = 1e-5
TOLERANCES = {"float32": 5e-6, "bfloat16": 3e-2, "float16": 4e-3}


def random_values(dtype, scale=1.0, shape=(5, 3, 48)):
    """(x [..., D], weight [D], bias [D]), rounded to dtype."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal(shape) * scale + 0.5 * scale
    weight, bias = generator.uniform(0.5, 1.5, shape[-1]), generator.standard_normal(shape[-1])
    return tuple(jnp.asarray(values, dtype) for values in (x, weight, bias))


def in_float64(*arrays):
    return tuple(np.asarray(array, np.float64) for array in arrays)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])  # 300: squares past the largest float16
def test_rms_norm_is_its_definition(dtype, scale):
    x, weight, _ = random_values(dtype, scale)
    normalized = rms_norm(x, weight, EPSILON)
    wide, wide_weight = in_float64(x, weight)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + EPSILON) * wide_weight
    assert normalized.dtype == x.dtype
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(np.asarray(normalized, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_is_its_definition(dtype, has_bias):
    x, weight, bias = random_values(dtype)
    normalized = layer_norm(x, weight, bias if has_bias else None, EPSILON)
    wide, wide_weight, wide_bias = in_float64(x, weight, bias)
    variance = wide.var(axis=-1, keepdims=True)
    expected = (wide - wide.mean(axis=-1, keepdims=True)) / np.sqrt(variance + EPSILON) * wide_weight
    expected = expected + wide_bias if has_bias else expected
    assert normalized.dtype == x.dtype
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(np.asarray(normalized, np.float64), expected, rtol=tolerance, atol=2 * tolerance)


def test_a_row_of_zeros_stays_finite():
    zeros, ones = jnp.zeros((2, 8)), jnp.ones(8)
    np.testing.assert_array_equal(rms_norm(zeros, ones, 1e-6), zeros)
    np.testing.assert_array_equal(layer_norm(zeros, ones, None, 1e-6), zeros)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_transformers_agrees_on_rms_norm(dtype):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    x, weight, _ = random_values(dtype)
    norm = modeling.Qwen2RMSNorm(x.shape[-1], EPSILON)
    norm.weight.data = torch.tensor(np.asarray(weight, np.float32)).to(getattr(torch, dtype))
    expected = norm(torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, dtype))).detach().float().numpy()
    normalized = np.asarray(rms_norm(x, weight, EPSILON), np.float32)
    rounding = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}[dtype]  # one unit in the last place
    np.testing.assert_allclose(normalized, expected, rtol=rounding, atol=rounding)
    # Rounded at the same places: to dtype before the weight, and after it.
    assert dtype == "float32" or np.mean(normalized == expected) > 0.99


def test_torch_agrees_on_layer_norm():
    torch = pytest.importorskip("torch")
    x, weight, bias = random_values("float32")
    as_torch = [torch.tensor(np.asarray(values)) for values in (x, weight, bias)]
    expected = torch.nn.functional.layer_norm(as_torch[0], weight.shape, as_torch[1], as_torch[2], EPSILON).numpy()
    np.testing.assert_allclose(layer_norm(x, weight, bias, EPSILON), expected, rtol=2e-6, atol=2e-6)
