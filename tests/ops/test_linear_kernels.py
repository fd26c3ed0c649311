"""The kernel behind the models' products: where it is chosen, and that a decode step with it gives what XLA's gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import DecodeInputs, fresh_inputs
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.models import config_from_hf
from miniinfer_jax.models.decoder import forward, param_specs
from miniinfer_jax.ops.attention import BACKENDS
from miniinfer_jax.ops.linear import PLAIN, Products, gated_linear, linear
from miniinfer_jax.ops.linear_kernels import KERNELS, gated_linear_kernel, is_faster, linear_kernel
from miniinfer_jax.params import random_init
from tests.tiny import TINY_CONFIG

INTERPRETED = Products(partial(linear_kernel, interpret=True), partial(gated_linear_kernel, interpret=True))
PRODUCTS = [
    pytest.param(INTERPRETED, id="interpreted"),
    pytest.param(KERNELS, id="compiled", marks=pytest.mark.gpu),
]


def random(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    difference = np.asarray(out, np.float64) - np.asarray(expected, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected, np.float64)))


def is_by_kernel(function, *args, **options) -> bool:
    return "_launch" in str(jax.make_jaxpr(partial(function, **options))(*args))


@pytest.mark.parametrize("products", PRODUCTS)
def test_any_axes(products):
    """The projections of heads: several output axes with a bias, and several input axes with a residual."""
    hidden, heads = random(0, 2, 64), random(1, 2, 4, 16)
    to_heads, bias, back = random(2, 2, 3, 16, 64), random(3, 2, 3, 16), random(4, 64, 4, 16)
    norm = (random(5, 64), 1e-6)
    out, expected = (one.linear(hidden, to_heads, bias, norm=norm) for one in (products, PLAIN))
    assert out.shape == (2, 2, 3, 16) and relative_error(out, expected) < 5e-3
    out, expected = (one.linear(heads, back, residual=hidden, num_input_axes=2) for one in (products, PLAIN))
    assert out.shape == (2, 64) and relative_error(out, expected) < 5e-3


@pytest.mark.parametrize(
    ("num_rows", "dtype", "chosen"),
    [(1, "bfloat16", True), (8, "float16", True), (9, "bfloat16", False), (1, "float32", False)],
)
def test_is_chosen_by_rows_and_dtype(num_rows, dtype, chosen):
    inputs, weight = random(0, num_rows, 64, dtype=dtype), random(1, 2, 16, 64, dtype=dtype)
    assert is_faster(num_rows, 64, 32, dtype) == chosen
    assert is_by_kernel(linear_kernel, inputs, weight[0]) == chosen
    assert is_by_kernel(partial(gated_linear_kernel, activation="silu"), inputs, weight) == chosen
    assert not is_by_kernel(partial(gated_linear_kernel, activation="gelu"), inputs, weight)
    if not chosen:
        assert np.array_equal(linear_kernel(inputs, weight), linear(inputs, weight))
        assert np.array_equal(gated_linear_kernel(inputs, weight, "silu"), gated_linear(inputs, weight, "silu"))


def tiny_config(qk_norm: bool) -> ModelConfig:
    family = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16} if qk_norm else {}
    return config_from_hf(TINY_CONFIG | {"hidden_size": 64, "torch_dtype": "bfloat16"} | family)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("products", PRODUCTS)
def test_a_decode_step_gives_what_xla_gives(products, qk_norm):
    config = tiny_config(qk_norm)
    params = random_init(param_specs(config), jax.random.key(0))
    cache = kv_cache.create(config, 4, 16, "bfloat16")
    inputs = DecodeInputs(
        token_ids=jnp.array([5, 6], jnp.int32),
        positions=jnp.array([0, 7], jnp.int32),
        slots=jnp.array([0, 39], jnp.int32),
        context_lens=jnp.array([1, 8], jnp.int32),
        page_table=jnp.array([[0], [2]], jnp.int32),
    )
    (out, pages), (expected, expected_pages) = (
        jax.jit(partial(forward, config, backend=BACKENDS["xla"]._replace(products=one)))(params, cache, inputs)
        for one in (products, PLAIN)
    )
    assert relative_error(out, expected) < 2e-2
    for layer, expected_layer in zip(pages.layers, expected_pages.layers, strict=True):
        assert relative_error(layer, expected_layer) < 2e-2


def test_prefill_is_xla_s():
    config = tiny_config(qk_norm=False)
    params = random_init(param_specs(config), jax.random.key(0))
    cache, inputs = kv_cache.create(config, 4, 16, "bfloat16"), fresh_inputs(jnp.array([[5, 6, 7]]), 16)
    backend = BACKENDS["xla"]._replace(products=INTERPRETED)
    out, expected = (forward(config, params, cache, inputs, one)[0] for one in (backend, BACKENDS["xla"]))
    assert np.array_equal(np.asarray(out), np.asarray(expected))
