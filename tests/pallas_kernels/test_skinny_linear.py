"""Products of few rows with what stands around them, by the plain operations and by the kernel."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.ops.linear import gated_linear, linear
from miniinfer_jax.ops.norms import rms_norm
from miniinfer_jax.pallas_kernels import skinny_linear as kernel
from miniinfer_jax.pallas_kernels.skinny_plan import SHARED_BYTES, Spec, choose_plan

EPSILON = 1e-6
IMPLEMENTATIONS = {
    "reference": (linear, partial(gated_linear, activation="silu")),
    "interpreted": (partial(kernel.skinny_linear, interpret=True), partial(kernel.skinny_gated_linear, interpret=True)),
    "compiled": (kernel.skinny_linear, kernel.skinny_gated_linear),
}
PARAMS = ["reference", "interpreted", pytest.param("compiled", marks=pytest.mark.gpu)]
KERNELS = PARAMS[1:]
# (inputs, outputs) of the products of 0.5B, 0.6B, 1.5B and 7B models.
PUBLISHED = [
    (896, 1152), (896, 896), (4864, 896), (1024, 4096), (2048, 1024), (3072, 1024), (1536, 2048), (8960, 1536),
    (3584, 4608), (3584, 3584), (18944, 3584),
]  # fmt: skip
PUBLISHED_GATED = [(896, 4864), (1024, 3072), (1536, 8960), (3584, 18944)]


@pytest.fixture(params=PARAMS)
def implementation(request):
    if request.param == "interpreted" and importlib.util.find_spec("jax._src.pallas.mosaic_gpu.interpret") is None:
        pytest.skip("this jax cannot interpret Mosaic GPU kernels")
    return request.param


def random(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def exact_product(inputs: jax.Array, weight: jax.Array) -> np.ndarray:
    return np.asarray(inputs, np.float64) @ np.asarray(weight, np.float64).T


def relative_error(out: jax.Array, expected: np.ndarray) -> float:
    difference = np.asarray(out, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("num_rows", "input_size", "output_size"),
    # One row; one step that few warps take; a last step that some take; several batches; more than 8 rows.
    [(1, 256, 192), (3, 40, 64), (8, 1096, 264), (2, 10240, 8), (9, 520, 64), (16, 1024, 4240)],
)
def test_product_is_exact_to_rounding(implementation, num_rows, input_size, output_size):
    inputs, weight = random(0, num_rows, input_size), random(1, output_size, input_size)
    multiply, _ = IMPLEMENTATIONS[implementation]
    expected = exact_product(inputs, weight)
    assert relative_error(multiply(inputs, weight, output_dtype=jnp.float32), expected) < 1e-5
    out = multiply(inputs, weight)
    assert out.dtype == inputs.dtype and relative_error(out, expected) < 3e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_rows", [2, 11])
def test_norm_bias_and_residual_round_as_the_plain_operations_do(implementation, num_rows, dtype):
    make = partial(random, dtype=dtype)
    inputs, weight, residual = make(0, num_rows, 256), make(1, 128, 256), make(2, num_rows, 128)
    extras = {"norm": (make(3, 256), EPSILON), "bias": make(4, 128), "residual": residual}
    out = IMPLEMENTATIONS[implementation][0](inputs, weight, **extras)
    expected = linear(inputs, weight, **extras)
    # Sums in another order may round to the neighbour: of few results, and no further.
    different = np.mean(np.asarray(out) != np.asarray(expected))
    assert different < 0.02
    assert relative_error(out, np.asarray(expected, np.float64)) < 1e-3


@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize("has_norm", [False, True])
def test_gated_product(implementation, num_rows, has_norm):
    inputs, weight = random(0, num_rows, 256), random(1, 2, 64, 256) * 0.1
    norm = (random(2, 256), EPSILON) if has_norm else None
    out = IMPLEMENTATIONS[implementation][1](inputs, weight, norm=norm)
    normalized = inputs if norm is None else rms_norm(inputs, *norm)
    gate, up = exact_product(normalized, weight[0]), exact_product(normalized, weight[1])
    assert out.dtype == inputs.dtype
    assert relative_error(out, gate / (1 + np.exp(-gate)) * up) < 6e-3


def supported(cases: list, num_weights: int) -> list:
    return [
        (num_rows, *case)
        for num_rows in (1, 2, 5, 8, 16)
        for case in cases
        if kernel.unsupported(num_rows, *case, "bfloat16", num_weights) is None
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "input_size", "output_size"), supported(PUBLISHED, 1))
def test_published_sizes(num_rows, input_size, output_size):
    inputs, weight = random(0, num_rows, input_size), random(1, output_size, input_size)
    extras = {"norm": (random(2, input_size), EPSILON), "residual": random(3, num_rows, output_size)}
    expected = linear(inputs, weight, **extras, output_dtype=jnp.float32)
    out = kernel.skinny_linear(inputs, weight, **extras)
    assert relative_error(out, np.asarray(expected, np.float64)) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "input_size", "output_size"), supported(PUBLISHED_GATED, 2))
def test_published_gated_sizes(num_rows, input_size, output_size):
    inputs, weight = random(0, num_rows, input_size), random(1, 2, output_size, input_size) * input_size**-0.5
    norm = (random(2, input_size), EPSILON)
    expected = gated_linear(inputs, weight, "silu", norm=norm)
    out = kernel.skinny_gated_linear(inputs, weight, norm=norm)
    assert relative_error(out, np.asarray(expected, np.float64)) < 6e-3


@pytest.mark.parametrize("name", KERNELS)
def test_rows_do_not_know_their_neighbours(name):
    inputs, weight, norm = random(0, 4, 256), random(1, 64, 256), (random(2, 256), EPSILON)
    multiply, _ = IMPLEMENTATIONS[name]
    others = inputs.at[1:].set(jnp.nan)
    alone, among = multiply(others, weight, norm=norm)[0], multiply(inputs, weight, norm=norm)[0]
    assert np.array_equal(np.asarray(alone), np.asarray(among))


@pytest.mark.gpu
@pytest.mark.parametrize(("few", "many"), [(1, 8), (9, 16)])
def test_a_row_has_the_same_bits_among_any_number_of_rows(few, many):
    inputs, weight, norm = random(0, many, 3584), random(1, 512, 3584), (random(2, 3584), EPSILON)
    alone, among = (kernel.skinny_linear(inputs[:size], weight, norm=norm)[:few] for size in (few, many))
    assert np.array_equal(np.asarray(alone), np.asarray(among))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((17, 256, 64, "bfloat16"), "17 rows"),
        ((1, 250, 64, "bfloat16"), "input size 250 is not a multiple of 8"),
        ((1, 256, 100, "bfloat16"), "output size 100 is not a multiple of 8"),
        ((1, 256, 64, "float32"), "neither bfloat16 nor float16"),
        ((8, 18944, 3584, "bfloat16"), "bytes of shared memory"),
    ],
)
def test_sizes_that_cannot_run_are_refused(sizes, reason):
    assert reason in kernel.unsupported(*sizes)
    num_rows, input_size, output_size, dtype = sizes
    with pytest.raises(ValueError, match=reason):
        kernel.skinny_linear(jnp.zeros((num_rows, input_size), dtype), jnp.zeros((output_size, input_size), dtype))


@pytest.mark.parametrize("num_rows", range(1, 17))
def test_every_plan_covers_its_product(num_rows):
    for cases, num_weights in ((PUBLISHED, 1), (PUBLISHED_GATED, 2)):
        for input_size, output_size in cases:
            plan = choose_plan(num_rows, input_size, output_size, num_weights)
            spec = Spec(plan, num_rows, input_size, output_size, num_weights, "bfloat16", "bfloat16",
                        EPSILON, False, False, False)  # fmt: skip
            assert output_size % plan.tile_outputs == 0 and plan.tile_outputs % spec.group_outputs == 0
            assert spec.num_steps * spec.step_size >= input_size > (spec.num_steps - 1) * spec.step_size
            assert plan.batch_steps * spec.num_batches >= spec.num_steps
            assert num_rows * plan.tile_outputs <= 512  # a result a thread
            fits = spec.shared_bytes <= SHARED_BYTES
            assert fits == (kernel.unsupported(num_rows, input_size, output_size, "bfloat16", num_weights) is None)
            assert fits or input_size * num_rows > 60_000
