"""Flash attention over pages against dense attention in numpy: the plain-XLA reference, interpreted, and on a GPU."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.batch import PrefillInputs
from miniinfer_jax.ops.attention import BACKENDS
from miniinfer_jax.pallas_kernels import flash_prefill, mosaic
from miniinfer_jax.pallas_kernels.flash_prefill import choose_tiling
from miniinfer_jax.pallas_kernels.prefill_tiles import Spec, Tile, Tiling, list_tiles, num_blocks

RAGGED = ((3, 1), (0, 0), (0, 19), (70, 9))
MIXED = ((1000, 1), (0, 0), (0, 1), (0, 300), (1030, 137), (77, 64), (300, 7), (15, 1), (0, 8), (129, 128))


@dataclass(frozen=True)
class Case:
    """The sizes of a batch: chunks are (tokens in the cache before, tokens of the chunk)."""

    chunks: tuple[tuple[int, int], ...]
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    num_padding: int = 2
    tiling: Tiling | None = None  # None: the usual one

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.chunks)


def make_arrays(case: Case, seed: int = 0) -> tuple[jax.Array, ...]:
    """Random queries and pages in any order; NaN in every slot that no chunk owns, and spare entries point there."""
    generator = np.random.default_rng(seed)
    contexts = [cached + length for cached, length in case.chunks]
    num_used = [-(-context // case.page_size) for context in contexts]
    num_pages = sum(num_used) + 2
    page_ids = generator.permutation(num_pages)
    page_table = np.full((len(contexts), max(num_used) + 2), page_ids[-1])
    is_owned = np.zeros((num_pages, case.page_size), bool)
    first = 0
    for row, (context, count) in enumerate(zip(contexts, num_used, strict=True)):
        page_table[row, :count] = page_ids[first : first + count]
        is_owned[page_table[row, :count]] = np.arange(count * case.page_size).reshape(count, case.page_size) < context
        first += count
    pages = generator.standard_normal((num_pages, case.page_size, case.num_kv_heads, 2, case.head_dim))
    pages[~is_owned] = np.nan
    shape = (case.num_tokens + case.num_padding, case.num_heads, case.head_dim)
    queries = 2 * generator.standard_normal(shape)  # some keys matter much more than others
    starts = np.cumsum([0, *(length for _, length in case.chunks)])
    indices = (jnp.asarray(array, jnp.int32) for array in (page_table, starts, contexts))
    return jnp.asarray(queries, case.dtype), jnp.asarray(pages, case.dtype), *indices


def dense_attention(case: Case, arrays: tuple[jax.Array, ...]) -> np.ndarray:
    """The definition in float32 -> [T without padding, N, H]."""
    queries, pages = (np.asarray(array, np.float32) for array in arrays[:2])
    page_table = np.asarray(arrays[2])
    outputs = []
    start = 0
    for row, (cached, length) in enumerate(case.chunks):
        own = pages[page_table[row]].reshape(-1, *pages.shape[2:])[: cached + length]
        keys, values = (np.repeat(own[:, :, side], case.num_heads // case.num_kv_heads, axis=1) for side in (0, 1))
        scores = np.einsum("qnh,knh->nqk", queries[start : start + length], keys) / np.sqrt(case.head_dim)
        if case.soft_cap is not None:
            scores = case.soft_cap * np.tanh(scores / case.soft_cap)
        distance = np.arange(cached, cached + length)[:, None] - np.arange(cached + length)
        is_seen = (distance >= 0) & (distance < (case.window or 2**30))
        weights = np.exp(np.where(is_seen, scores, -np.inf) - scores.max(axis=-1, keepdims=True, initial=-1e30))
        weights /= weights.sum(axis=-1, keepdims=True)
        outputs.append(np.einsum("nqk,knh->qnh", weights, values))
        start += length
    return np.concatenate(outputs)


def by_reference(case: Case, arrays: tuple[jax.Array, ...]) -> jax.Array:
    queries, pages, page_table, query_starts, context_lens = arrays
    if case.soft_cap is not None:
        pytest.skip("the reference has no soft cap")
    positions = [np.arange(cached, cached + length) for cached, length in case.chunks]
    unused = jnp.zeros(queries.shape[0], jnp.int32)
    inputs = PrefillInputs(
        token_ids=unused,
        positions=jnp.asarray(np.concatenate([*positions, np.zeros(case.num_padding)]), jnp.int32),
        slots=unused,
        query_starts=query_starts,
        context_lens=context_lens,
        page_table=page_table,
    )
    return BACKENDS["xla"].prefill(queries, pages, inputs, case.window)


def by_kernel(case: Case, arrays: tuple[jax.Array, ...], interpret: bool) -> jax.Array:
    tiling = case.tiling or choose_tiling(case.head_dim)
    return jax.jit(lambda *five: flash_prefill.attend(tiling, five, case.window, case.soft_cap, interpret))(*arrays)


def by_gpu(case: Case, arrays: tuple[jax.Array, ...]) -> jax.Array:
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    return by_kernel(case, arrays, interpret=False)


IMPLEMENTATIONS = {
    "reference": by_reference,
    "interpreted": lambda case, arrays: by_kernel(case, arrays, interpret=True),
    "gpu": by_gpu,
}
ON_CPU = ("reference", "interpreted")
ON_GPU = pytest.param("gpu", marks=pytest.mark.gpu)

SMALL_CASES = {
    "ragged": Case(RAGGED, tiling=Tiling(1, 64, 2, takes_turns=False)),
    # The second chunk sees nothing but the last page of its block, which ends in NaN.
    "windowed": Case(
        ((0, 20), (110, 7), (50, 30)), 7, 1, page_size=32, dtype="float16", window=12, tiling=Tiling(2, 64, 2)
    ),
    "capped": Case(((5, 12), (0, 1)), 4, 4, 80, 64, soft_cap=3.0, tiling=Tiling(1, 64, 2)),
}
LARGE_CASES = {
    **{f"d {dim}": Case(MIXED, 8, 4, dim, 32) for dim in mosaic.HEAD_DIMS},
    **{f"page {size}": Case(MIXED, 14, 2, 128, size, "float16") for size in flash_prefill.PAGE_SIZES},
    **{f"ratio {ratio}": Case(MIXED, 2 * ratio, 2, 64, 16) for ratio in (1, 2, 4, 7, 8)},
    **{f"window {size}": Case(MIXED, 8, 2, 128, 16, window=size) for size in (1, 100, 128, 500)},
    "soft cap": Case(MIXED, 4, 4, 256, 16, soft_cap=5.0, num_padding=0),
    "many rows": Case(tuple((3 * row, 1) for row in range(255)) + ((500, 700),), 28, 4, 128, 16, num_padding=69),
    "long prefix": Case(((30000, 40),), 8, 1, 128, 128),
}


def check(case: Case, implementation: str) -> None:
    arrays = make_arrays(case)
    out = np.asarray(IMPLEMENTATIONS[implementation](case, arrays), np.float32)
    expected = dense_attention(case, arrays)
    assert np.isfinite(out).all(), "foreign values leaked"
    error = np.linalg.norm(out[: case.num_tokens] - expected) / np.linalg.norm(expected)
    assert error < 1e-2 if case.dtype == "bfloat16" else error < 2e-3
    if implementation != "reference":
        assert not out[case.num_tokens :].any(), "padding is zeros"


@pytest.mark.parametrize("implementation", [*ON_CPU, ON_GPU])
@pytest.mark.parametrize("name", SMALL_CASES)
def test_small_batches(name, implementation):
    check(SMALL_CASES[name], implementation)


@pytest.mark.parametrize("implementation", [ON_GPU])
@pytest.mark.parametrize("name", LARGE_CASES)
def test_large_batches(name, implementation):
    check(LARGE_CASES[name], implementation)


@pytest.mark.gpu
def test_neighbours_change_no_bit():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    case = Case(MIXED, 14, 2, 128, 16, num_padding=0)
    arrays = make_arrays(case)
    together = np.asarray(by_gpu(case, arrays), np.float32)
    queries, pages, page_table, starts, contexts = arrays
    for row in range(len(case.chunks)):
        first, behind = int(starts[row]), int(starts[row + 1])
        own = (page_table[row : row + 1], jnp.array([0, behind - first], jnp.int32), contexts[row : row + 1])
        alone = np.asarray(by_gpu(case, (jnp.roll(queries, -first, axis=0), pages, *own)), np.float32)
        np.testing.assert_array_equal(alone[: behind - first], together[first:behind])


@pytest.mark.parametrize("head_dim", mosaic.HEAD_DIMS)
def test_every_head_dim_lowers_for_a_gpu(head_dim):
    case = Case(((0, 300), (1000, 1)), 14, 2, head_dim, 32, window=100, soft_cap=5.0)
    arrays = make_arrays(case)
    traced = jax.jit(lambda *five: flash_prefill.flash_prefill_attention(*five, window=100, soft_cap=5.0)).trace(
        *arrays
    )
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("group", [1, 7])
def test_work_list_has_every_token_once_and_the_heaviest_tiles_first(group, window):
    case = Case(MIXED, group, 1, 64, window=window, num_padding=21)
    spec = Spec(choose_tiling(64), group, 1, 64, case.dtype, 8, 16, window, None, False)
    _, _, _, starts, contexts = make_arrays(case)
    num_tokens = -(-(case.num_tokens + case.num_padding) // 8) * 8
    work, num_tiles = list_tiles(spec, num_tokens, starts, contexts)
    tiles = np.asarray(work)[: int(num_tiles[0])]
    covered = np.zeros((num_tokens, group), int)
    for _, start, end, _, first_octet in tiles:
        for octet in range(first_octet, min(first_octet + spec.tile_octets, -(-end // 8) * group)):
            token = octet // group * 8
            covered[max(token, start) : min(token + 8, end), octet % group] += 1
    assert (covered == 1).all()
    sizes = [int(num_blocks(spec, Tile(*jnp.asarray(tile)))) for tile in tiles]
    assert sizes == sorted(sizes, reverse=True)


def test_shapes_that_cannot_run_are_refused_with_the_reason():
    assert flash_prefill.unsupported(128, 16, 28, 4, "bfloat16") is None
    assert "head_dim 72" in str(flash_prefill.unsupported(72, 16, 4, 2, "bfloat16"))
    assert "page_size 24" in str(flash_prefill.unsupported(64, 24, 4, 2, "bfloat16"))
    assert "5 query heads on 2" in str(flash_prefill.unsupported(64, 16, 5, 2, "bfloat16"))
    assert "float32" in str(flash_prefill.unsupported(64, 16, 4, 2, "float32"))
    arrays = make_arrays(Case(((0, 4),), page_size=24))
    with pytest.raises(ValueError, match="page_size 24"):
        flash_prefill.flash_prefill_attention(*arrays)
    queries, *others = make_arrays(Case(((0, 4),)))
    with pytest.raises(ValueError, match="queries are float16"):
        flash_prefill.flash_prefill_attention(queries.astype(jnp.float16), *others)
    with pytest.raises(ValueError, match="window is 0"):
        flash_prefill.flash_prefill_attention(queries, *others, window=0)
