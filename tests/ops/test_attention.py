"""Attention over pages: every implementation against a dense float64 oracle, torch, and its own promises."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, Shape, dense_attention, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from miniinfer_jax import kv_cache
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.ops.attention import BACKENDS, AttentionBackend, _reference, attention, choose_backend
from miniinfer_jax.ops.attention_reference import Tile

# A backend gets a row where it runs: on the CPU, and marked `gpu` on the GPU (pytest -m gpu).
IMPLEMENTATIONS = [
    pytest.param(BACKENDS["xla"], id="xla"),
    pytest.param(_reference("small-tiles", Tile(num_rows=2, num_keys=64)), id="small-tiles"),
    pytest.param(BACKENDS["xla"], id="xla-gpu", marks=pytest.mark.gpu),
]
MODEL = ModelConfig("Qwen2ForCausalLM", 128, 128, 1, 2, 1, 64, 128, 4096)
KEY_BLOCK = 256
TOLERANCES = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

SHAPES = {
    "mha": Shape(num_heads=4, num_kv_heads=4),
    "gqa2": Shape(num_heads=4, num_kv_heads=2, page_size=1, max_pages=64),
    "gqa7": Shape(num_heads=14, num_kv_heads=2, page_size=16, head_dim=8),
    "gqa8": Shape(num_heads=8, num_kv_heads=1, page_size=8, head_dim=32),
    "page3": Shape(num_heads=6, num_kv_heads=3, page_size=3, max_pages=22),  # no power of two
    "long": Shape(num_heads=4, num_kv_heads=2, page_size=16, max_pages=40, head_dim=8),  # several key blocks
}
RAGGED = [(0, 13), (29, 1), (7, 18), (0, 1), (16, 16), (45, 3)]
LONG = [(KEY_BLOCK, 3), (600, 17), (0, 40), (KEY_BLOCK - 1, 1)]
DECODE = [(0, 1), (15, 1), (16, 1), (47, 1), (3, 1)]
LONG_DECODE = [(KEY_BLOCK - 1, 1), (KEY_BLOCK, 1), (639, 1), (0, 1), (2 * KEY_BLOCK + 5, 1)]
WINDOWS = [None, 1, 5, 33]

implementations = pytest.mark.parametrize("backend", IMPLEMENTATIONS)


def run(backend: AttentionBackend, case: Case, window: int | None, bounded: bool, decodes: bool = False) -> np.ndarray:
    """[T without padding, N, H] in float64."""
    inputs = case.decode_inputs(bounded) if decodes else case.prefill_inputs(bounded)
    function = jax.jit(partial(attention, window=window, backend=backend))
    attended = function(case.queries, case.pages, inputs)
    assert attended.shape == case.queries.shape and attended.dtype == case.queries.dtype
    attended = np.asarray(attended, np.float64)
    assert np.all(np.isfinite(attended)), "padding must stay finite too"
    return attended[: case.num_tokens]


def assert_close(attended: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(attended, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@implementations
@pytest.mark.parametrize("decodes", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(backend, name, decodes):
    chunks = {False: RAGGED, True: DECODE} if name != "long" else {False: LONG, True: LONG_DECODE}
    case = make_case(SHAPES[name], chunks[decodes], num_padding=0 if decodes else 12)
    bounded = name not in ("gqa2", "page3")
    assert_close(run(backend, case, None, bounded, decodes), dense_attention(case, None), "float32")


@implementations
@pytest.mark.parametrize("decodes", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("bounded", [False, True], ids=["all-pages", "stops-early"])
def test_windows_over_several_key_blocks(backend, window, decodes, bounded):
    case = make_case(SHAPES["long"], LONG_DECODE if decodes else LONG, num_padding=0 if decodes else 3)
    assert_close(run(backend, case, window, bounded, decodes), dense_attention(case, window), "float32")


@implementations
@pytest.mark.parametrize("decodes", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(backend, dtype, decodes):
    shape = dataclasses.replace(SHAPES["long"], dtype=dtype)
    case = make_case(shape, LONG_DECODE if decodes else LONG)
    assert_close(run(backend, case, None, True, decodes), dense_attention(case, None), dtype)


@implementations
def test_any_ragged_batch_through_one_program(backend):
    """Chunks are drawn, empty ones too; the shapes, and with them the program, stay the same."""
    shape, num_rows, num_tokens = Shape(max_pages=12), 5, 64
    num_traces = 0

    @jax.jit
    def attend(queries, pages, inputs):
        nonlocal num_traces
        num_traces += 1
        return attention(queries, pages, inputs, 9, backend)

    chunk = st.integers(0, 12).flatmap(lambda length: st.tuples(st.integers(0 if length else 1, 36), st.just(length)))

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(chunks=st.lists(chunk, min_size=num_rows, max_size=num_rows).filter(lambda rows: any(n for _, n in rows)))
    def check(chunks):
        used = sum(length for _, length in chunks)
        case = make_case(shape, chunks, num_padding=num_tokens - used, seed=used)
        attended = attend(case.queries, case.pages, case.prefill_inputs(bounded=True))
        assert_close(np.asarray(attended, np.float64)[:used], dense_attention(case, 9), "float32")

    check()
    assert num_traces == 1


@implementations
@pytest.mark.parametrize("decodes", [False, True], ids=["prefill", "decode"])
def test_what_no_sequence_owns_changes_no_bit(backend, decodes):
    """Slots behind a context, pages of nobody and entries behind the page table's used part."""
    chunks = LONG_DECODE if decodes else LONG
    quiet, loud = (
        make_case(dataclasses.replace(SHAPES["long"], garbage=scale), chunks, num_padding=0 if decodes else 5)
        for scale in (0.0, np.nan)
    )
    np.testing.assert_array_equal(quiet.queries, loud.queries)
    first, second = (run(backend, case, None, True, decodes) for case in (quiet, loud))
    np.testing.assert_array_equal(first, second)


@implementations
@pytest.mark.parametrize("decodes", [False, True], ids=["prefill", "decode"])
def test_visiting_every_page_changes_no_bit(backend, decodes):
    case = make_case(SHAPES["long"], DECODE if decodes else RAGGED)
    np.testing.assert_array_equal(run(backend, case, None, True, decodes), run(backend, case, None, False, decodes))


@implementations
def test_where_the_pages_lie_changes_no_bit(backend):
    case = make_case(SHAPES["long"], LONG)
    order = np.random.default_rng(3).permutation(case.pages.shape[0])  # page order[i] moves to i
    moved = dataclasses.replace(
        case,
        pages=case.pages[order],
        page_table=jnp.asarray(np.argsort(order)[np.asarray(case.page_table)]),
    )
    np.testing.assert_array_equal(run(backend, case, 33, True), run(backend, moved, 33, True))


@implementations
def test_chunks_of_one_token_are_decode(backend):
    case = make_case(SHAPES["gqa7"], DECODE)
    prefill, decode = run(backend, case, 5, True), run(backend, case, 5, True, decodes=True)
    np.testing.assert_allclose(prefill, decode, rtol=1e-6, atol=1e-6)


@implementations
@pytest.mark.parametrize("window", [None, 6])
def test_torch_agrees(backend, window):
    torch = pytest.importorskip("torch")
    case = make_case(SHAPES["gqa7"], RAGGED)
    attended, queries, first = run(backend, case, window, True), np.asarray(case.queries), 0
    for (cached, length), (keys, values) in zip(case.chunks, case.sequences, strict=True):
        rows, columns = np.arange(cached, cached + length)[:, None], np.arange(cached + length)
        mask = columns <= rows if window is None else (columns <= rows) & (columns > rows - window)
        own = (queries[first : first + length], keys, values)
        as_torch = [torch.tensor(x.astype(np.float32)).transpose(0, 1)[None] for x in own]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *as_torch, attn_mask=torch.tensor(mask), enable_gqa=True
        )
        assert_close(attended[first : first + length], expected[0].transpose(0, 1).double().numpy(), "float32")
        first += length


@pytest.mark.parametrize("window", [None, 7])
def test_gradients_are_those_of_dense_attention(window):
    """Through the write to the pages too: scoring and training run the forward that serves."""
    case = make_case(SHAPES["long"], [(0, 300), (0, 37)])
    inputs, group = case.prefill_inputs(bounded=False), 2
    generator = np.random.default_rng(5)
    keys, values = (jnp.asarray(generator.standard_normal((337, 2, 8)), jnp.float32) for _ in range(2))
    direction = jnp.asarray(generator.standard_normal(case.queries.shape), jnp.float32)
    is_visible = np.zeros((337, 337), bool)
    for start, length in ((0, 300), (300, 37)):
        rows, columns = np.arange(length)[:, None], np.arange(length)
        is_visible[start : start + length, start : start + length] = (columns <= rows) & (
            window is None or columns > rows - window
        )

    def paged(queries, keys, values):
        pages = kv_cache.write(case.pages, keys, values, inputs.slots)
        return jnp.sum(attention(queries, pages, inputs, window, BACKENDS["xla"]) * direction)

    def dense(queries, keys, values):
        keys, values = (jnp.repeat(x, group, axis=1) for x in (keys, values))
        scores = jnp.einsum("tnh,snh->nts", queries, keys) * 8**-0.5
        weights = jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf), axis=-1)
        return jnp.sum(jnp.einsum("nts,snh->tnh", weights, values) * direction)

    for got, expected in zip(
        *(jax.jit(jax.grad(f, argnums=(0, 1, 2)))(case.queries, keys, values) for f in (paged, dense)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


@dataclass(frozen=True)
class StandInDevice:
    platform: str
    compute_capability: str | None = None


HOPPER, AMPERE, CPU = StandInDevice("gpu", "9.0"), StandInDevice("gpu", "8.0"), StandInDevice("cpu")


@pytest.mark.parametrize(
    ("name", "device", "chosen"),
    [("auto", CPU, "xla-tiled"), ("auto", AMPERE, "xla"), ("auto", HOPPER, "pallas"), ("xla", HOPPER, "xla")],
)
def test_a_backend_is_chosen_by_name_and_device(name, device, chosen):
    assert choose_backend(name, MODEL, "bfloat16", 64, device) is BACKENDS[chosen]


@pytest.mark.parametrize(
    ("model", "dtype", "page_size"),
    [(dataclasses.replace(MODEL, head_dim=72), "bfloat16", 64), (MODEL, "bfloat16", 8), (MODEL, "float32", 64)],
)
def test_auto_passes_over_kernels_that_cannot_run_the_model(model, dtype, page_size):
    assert choose_backend("auto", model, dtype, page_size, HOPPER) is BACKENDS["xla"]
    with pytest.raises(ValueError, match="'pallas' can't run this: .*use auto, xla, xla-tiled"):
        choose_backend("pallas", model, dtype, page_size, HOPPER)


def test_a_backend_that_cannot_run_is_refused_by_name():
    with pytest.raises(
        ValueError, match="attention backend 'fast' is not known; known: auto, pallas, cudnn, xla, xla-tiled"
    ):
        choose_backend("fast", MODEL, "bfloat16", 64, CPU)
    with pytest.raises(ValueError, match="'pallas' can't run this: it needs a Hopper GPU .* use auto, xla, xla-tiled"):
        choose_backend("pallas", MODEL, "bfloat16", 64, CPU)
    with pytest.raises(ValueError, match="compute capability 8.0"):
        choose_backend("pallas", MODEL, "bfloat16", 64, AMPERE)
