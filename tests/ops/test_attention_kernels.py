"""The kernels and cuDNN as backends of the model: `jax.grad` through `forward`, and which step takes which way."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import fresh_inputs
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.models.decoder import forward, logits, param_specs
from miniinfer_jax.ops.attention import BACKENDS
from miniinfer_jax.ops.attention_cudnn import prefill_cudnn
from miniinfer_jax.ops.attention_kernels import prefill_kernel
from miniinfer_jax.params import random_init
from tests.ops.attention_cases import Shape, dense_attention, make_case

MODEL = ModelConfig("Qwen2ForCausalLM", 61, 64, 2, 2, 1, 64, 96, 4096, sliding_windows=(None, 5), dtype="bfloat16")
PAGE_SIZE = 16
INTERPRETED = BACKENDS["pallas"]._replace(prefill=partial(prefill_kernel, interpret=True))


def gradients(backend):
    """The loss of next tokens in two sequences of 21, a number that fills neither a page nor 8 tokens."""
    token_ids = jax.random.randint(jax.random.key(1), (2, 21), 0, MODEL.vocab_size)
    inputs = fresh_inputs(token_ids, PAGE_SIZE)

    def loss(params):
        cache = kv_cache.create(MODEL, 4, PAGE_SIZE, MODEL.dtype)
        hidden, _ = forward(MODEL, params, cache, inputs, backend)
        likely = jax.nn.log_softmax(logits(params, hidden))
        return -jnp.mean(jnp.take_along_axis(likely, jnp.roll(inputs.token_ids, -1)[:, None], axis=1))

    return jax.jit(jax.value_and_grad(loss))(random_init(param_specs(MODEL), jax.random.key(0)))


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(INTERPRETED, id="interpreted"),
        pytest.param(BACKENDS["pallas"], id="compiled", marks=pytest.mark.gpu),
    ],
)
def test_gradients_through_forward_are_the_definitions(backend):
    loss, got = gradients(backend)
    expected_loss, expected = gradients(BACKENDS["xla"])
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-3)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
        assert np.linalg.norm(difference) < 2e-2 * np.linalg.norm(np.asarray(other, np.float64))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([(0, 37), (0, 1), (0, 64), (0, 20)], id="fresh"),
        pytest.param([(0, 37), (5, 1), (16, 30)], id="mixed"),
        pytest.param([(0, 128)], id="whole"),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", pytest.param("cudnn", marks=pytest.mark.gpu)])
def test_prompts_by_a_library_are_the_definitions(implementation, chunks, window):
    dtype, tolerance = ("float32", 1e-5) if implementation == "xla" else ("bfloat16", 2e-2)
    shape = Shape(
        num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_pages=8, dtype=dtype, garbage=float("nan")
    )
    case = make_case(shape, chunks, num_padding=128 - sum(length for _, length in chunks))
    attend = jax.jit(prefill_cudnn, static_argnums=(3, 4))
    attended = attend(case.queries, case.pages, case.prefill_inputs(bounded=True), window, implementation)
    expected = dense_attention(case, window)
    np.testing.assert_allclose(
        np.asarray(attended, np.float64)[: case.num_tokens], expected, rtol=tolerance, atol=tolerance
    )


def test_the_library_computes_steps_of_fresh_prompts_alone(monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda queries, *_, **__: jnp.zeros_like(queries))
    for chunks, is_fresh in (([(0, 5), (0, 11)], True), ([(0, 5), (3, 11)], False)):
        case = make_case(Shape(), chunks)
        attended = prefill_cudnn(case.queries, case.pages, case.prefill_inputs(bounded=True), None)
        assert is_fresh == (not np.any(attended))
