"""Flash attention for ragged chunks of prompts over a paged cache, for Hopper GPUs (Pallas, Mosaic GPU).

Letters: T tokens, R chunks, N query heads, K kv heads, G = N / K, H head dim, P pages, S page size; C consumers,
B keys a block, W tiles (prefill_tiles; the copying warpgroup is in prefill_copies).

A program of C + 1 warpgroups stays on its multiprocessor and takes tile after tile: one warpgroup copies queries and
pages, C multiply 64 rows each. Softmax block by block (https://arxiv.org/abs/1805.02867); the scores of a block are
multiplied, and its softmax computed, beside the values of the block before (FlashAttention-3,
https://arxiv.org/abs/2407.08608).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from miniinfer_jax.pallas_kernels import mosaic
from miniinfer_jax.pallas_kernels import prefill_tiles as tiles
from miniinfer_jax.pallas_kernels.prefill_copies import (
    ROWS,
    Item,
    Refs,
    for_each_item,
    make_scratch,
    num_programs,
    produce,
)
from miniinfer_jax.pallas_kernels.prefill_tiles import OCTET, OCTETS, Spec, Tile, Tiling, div, rem

PAGE_SIZES = (8, 16, 32, 64, 128)
UNSEEN = -1e30  # finite: the running maximum of a row that has seen nothing
INTERPRETED = Tiling(1, 64, 2, takes_turns=False)  # the interpreter stalls where warpgroups outnumber a CPU's threads
REGISTERS = {2: (232, 40), 3: (160, 32)}  # by consumers: of one's thread, of a copying one's; else all have the most


def unsupported(head_dim: int, page_size: int, num_heads: int, num_kv_heads: int, dtype: Any) -> str | None:
    """Why the kernel cannot run these shapes, with what it takes; None where it can."""
    if reason := mosaic.attention_unsupported(head_dim, page_size, PAGE_SIZES, dtype):
        return reason
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads on {num_kv_heads} kv heads: takes a whole number of query heads a kv head"
    return None


@functools.partial(jax.jit, static_argnames=("window", "soft_cap", "interpret"))
def flash_prefill_attention(
    queries: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    query_starts: jax.Array,
    context_lens: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of chunks over their sequences' pages, scaled by 1 / sqrt(H) -> [T, N, H]; padding gives zeros.

    queries [T, N, H], pages [P, S, K, 2, H], page_table [R, *], query_starts [R + 1], context_lens [R]: chunk r is
    tokens [query_starts[r], query_starts[r + 1]), the last of them at position context_lens[r] - 1; tokens behind
    query_starts[R] are padding. A query sees the keys at positions up to its own, the last `window` of them; what lies
    behind a context, or in pages before the window, is never seen, NaN included. soft_cap: scores become
    soft_cap * tanh(score / soft_cap). Raises ValueError where `unsupported` has a reason. Jitted by itself: the layers
    of a model then share one compiled kernel instead of compiling one each.
    """
    _, page_size, num_kv_heads, _, head_dim = pages.shape
    if pages.dtype != queries.dtype:
        raise ValueError(f"queries are {queries.dtype} and pages {pages.dtype}: flash prefill takes one dtype")
    if reason := unsupported(head_dim, page_size, queries.shape[1], num_kv_heads, queries.dtype):
        raise ValueError(f"flash prefill attention cannot run {reason}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: takes 1 and more, or None")
    arrays = (queries, pages, page_table, query_starts, context_lens)
    return attend(INTERPRETED if interpret else choose_tiling(head_dim), arrays, window, soft_cap, interpret)


def choose_tiling(head_dim: int) -> Tiling:
    """What measured fastest (benchmarks/flash_prefill_variants.md)."""
    if head_dim == 64:  # exponentials take as long as products here: a third consumer instead of taking turns
        return Tiling(num_consumers=3, block_keys=128, num_stages=4, takes_turns=False)
    if head_dim <= 128:
        return Tiling(num_consumers=2, block_keys=128, num_stages=2)
    return Tiling(num_consumers=2, block_keys=64, num_stages=2)


def attend(
    tiling: Tiling, arrays: tuple[jax.Array, ...], window: int | None, soft_cap: float | None, interpret: bool
) -> jax.Array:
    """`flash_prefill_attention` of its five arrays, in a tiling of choice."""
    queries, pages, page_table, query_starts, context_lens = arrays
    num_tokens, num_heads, head_dim = queries.shape
    padded = jnp.pad(queries, ((0, -num_tokens % OCTET), (0, 0), (0, 0)))  # nothing is done where none is needed
    num_pages, page_size, num_kv_heads = pages.shape[:3]
    group = num_heads // num_kv_heads
    spec = Spec(tiling, group, num_kv_heads, head_dim, queries.dtype, num_pages, page_size, window, soft_cap, interpret)
    work, num_tiles = tiles.list_tiles(spec, padded.shape[0], query_starts, context_lens)
    launch = plgpu.kernel(
        functools.partial(_kernel, spec),
        out_type=jax.ShapeDtypeStruct(padded.shape, queries.dtype),
        scratch_types=make_scratch(spec),
        grid=(num_programs(spec),),
        grid_names=("program",),
        num_threads=tiling.num_consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": mosaic.interpreter()} if interpret else {}),
    )
    return launch(work, num_tiles, page_table, padded, pages)[:num_tokens]


def _kernel(spec: Spec, work, num_tiles, page_table, queries, pages, out, rows, *scratch) -> None:
    refs = Refs(work, num_tiles, page_table, queries, pages, out, *rows, *scratch)
    num_consumers = spec.tiling.num_consumers
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < num_consumers)
    def _():
        if num_consumers in REGISTERS:
            plgpu.set_max_registers(REGISTERS[num_consumers][0], action="increase")
        _consume(spec, refs, warpgroup)

    @pl.when(warpgroup == num_consumers)
    def _():
        if num_consumers in REGISTERS:
            plgpu.set_max_registers(REGISTERS[num_consumers][1], action="decrease")
        produce(spec, refs)


class _Running(NamedTuple):
    """The state of a consumer's softmax. The values of the newest block are not yet in `weighted`."""

    weighted: jax.Array  # [64, H] float32
    weights: jax.Array | None  # [64, B], of the newest block; None before the first
    maximum: jax.Array  # [64] float32
    total: jax.Array  # [64] float32


def _consume(spec: Spec, refs: Refs, warpgroup: jax.Array) -> None:
    """Attends with 64 rows of item after item."""
    tiling = spec.tiling
    if tiling.takes_turns:

        @pl.when(warpgroup == tiling.num_consumers - 1)
        def _():
            plgpu.barrier_arrive(refs.turns.at[0])

    nothing = _Running(
        _full(spec, (ROWS, spec.head_dim), 0),
        None,
        _full(spec, (ROWS,), UNSEEN),
        _full(spec, (ROWS,), 0),
    )

    def visit(item: Item, num_before: jax.Array) -> None:
        plgpu.barrier_wait(refs.queries_ready.at[0])

        def one(is_masked: bool, number: jax.Array, running: _Running) -> _Running:
            return _step(spec, refs, warpgroup, item.tile, num_before, is_masked, number, running)

        running = one(True, jnp.int32(0), nothing)
        _clear_values(spec, refs.values.at[rem(num_before, tiling.num_stages)], item.tile)
        num_blocks = tiles.num_blocks(spec, item.tile)
        num_right, num_unmasked = tiles.masked_steps(spec, item.tile)
        running = lax.fori_loop(jnp.int32(1), num_right, functools.partial(one, True), running)
        running = lax.fori_loop(num_right, num_unmasked, functools.partial(one, False), running)
        if spec.window is not None:
            running = lax.fori_loop(num_unmasked, num_blocks, functools.partial(one, True), running)
        newest = rem(num_before + num_blocks - 1, tiling.num_stages)
        weighted = _add_product(spec, running.weighted, running.weights, refs.values.at[newest])
        plgpu.barrier_arrive(refs.values_free.at[newest])
        _store(spec, refs, warpgroup, item, weighted, running.total)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.queries_free.at[0])

    for_each_item(spec, refs, visit)
    plgpu.wait_smem_to_gmem(0)
    if tiling.takes_turns:

        @pl.when(warpgroup == 0)
        def _():
            plgpu.barrier_wait(refs.turns.at[0])


def _step(
    spec: Spec,
    refs: Refs,
    warpgroup: jax.Array,
    tile: Tile,
    num_before: jax.Array,
    is_masked: bool,
    step: jax.Array,
    running: _Running,
) -> _Running:
    """The newest block's product, and beside it the next block's softmax."""
    tiling = spec.tiling
    number = num_before + step
    slot = rem(number, tiling.num_stages)
    next_consumer = rem(warpgroup + 1, tiling.num_consumers)
    last_block = tiles.end_blocks(spec, tile)[1]
    plgpu.barrier_wait(refs.keys_ready.at[slot])
    if tiling.takes_turns:
        plgpu.barrier_wait(refs.turns.at[warpgroup])

    def after_issue() -> None:
        if tiling.takes_turns:
            plgpu.barrier_arrive(refs.turns.at[next_consumer])

    def softmax(scores: jax.Array) -> tuple[jax.Array, ...]:
        plgpu.barrier_arrive(refs.keys_free.at[slot])
        if spec.soft_cap is not None:  # tanh(x) = 1 - 2 / (exp(2 x) + 1): the GPU's own tanh has 11 bits
            exponential = jnp.exp2(scores * (2 * spec.head_dim**-0.5 / spec.soft_cap * math.log2(math.e)))
            scores = 1 - 2 / (exponential + 1)
        if is_masked:
            scores = _mask(spec, warpgroup, tile, (last_block - step) * tiling.block_keys, scores)
        return _softmax(spec, scores, running)

    queries, keys = refs.rows.at[warpgroup], refs.keys.at[slot]
    weighted = running.weighted
    if running.weights is None:
        weights, maximum, total, shrink = _first_product(spec, queries, keys, after_issue, softmax)
    else:
        newest = rem(number - 1, tiling.num_stages)
        operands = (queries, keys, refs.values.at[newest])
        weighted, weights, maximum, total, shrink = _two_products(spec, operands, running, after_issue, softmax)
        plgpu.barrier_arrive(refs.values_free.at[newest])
    plgpu.barrier_wait(refs.values_ready.at[slot])
    shrunk = weighted * _across(shrink, spec.head_dim)
    return _Running(shrunk, weights.astype(spec.dtype), maximum, total)


def _mask(spec: Spec, warpgroup: jax.Array, tile: Tile, first_key: jax.Array, scores: jax.Array) -> jax.Array:
    rows = _iota(spec, (ROWS,), 0)
    tokens, _ = tiles.place_octet(spec, tile.first_octet + warpgroup * OCTETS + div(rows, OCTET))
    positions = tokens + rem(rows, OCTET) + (tile.context_len - tile.end)
    positions = _across(positions, spec.tiling.block_keys)
    keys = _iota(spec, scores.shape, 1) + first_key
    is_seen = keys <= positions
    if spec.window is not None:
        is_seen &= keys > positions - spec.window
    return jnp.where(is_seen, scores, -jnp.inf)


def _softmax(spec: Spec, scores: jax.Array, running: _Running) -> tuple[jax.Array, ...]:
    """Weights of the block, new maximum and total, and what to multiply older results by. Exponents are of 2."""
    factor = math.log2(math.e) * (spec.head_dim**-0.5 if spec.soft_cap is None else spec.soft_cap)
    maximum = jnp.maximum(running.maximum, scores.max(axis=1) * factor)
    weights = jnp.exp2(scores * factor - _across(maximum, scores.shape[1]))
    shrink = jnp.exp2(running.maximum - maximum)
    return weights, maximum, running.total * shrink + weights.sum(axis=1), shrink


def _clear_values(spec: Spec, values: Any, tile: Tile) -> None:
    """Zeros for foreign values in the last block: they may be NaN, and 0 * NaN is NaN. Each consumer writes the same.

    They lie behind the context, also in a page that stands in for those left of the window. Other blocks have none.
    """
    first_key = tiles.end_blocks(spec, tile)[1] * spec.tiling.block_keys
    first_own, num_valid = jnp.int32(0), tile.context_len - first_key
    is_own = num_valid >= spec.tiling.block_keys
    if spec.window is not None:
        first_own = tiles.end_pages(spec, tile)[0] * spec.page_size - first_key
        is_own &= first_own <= 0

    @pl.when(jnp.logical_not(is_own))
    def _():
        for first in range(0, spec.tiling.block_keys, ROWS):
            part = values.at[pl.ds(first, ROWS)]
            keys = _iota(spec, (ROWS, spec.head_dim), 0) + first
            is_valid = (keys >= first_own) & (keys < num_valid)
            part[...] = jnp.where(is_valid, part[...], 0).astype(spec.dtype)
        plgpu.commit_smem()


def _store(spec: Spec, refs: Refs, warpgroup: jax.Array, item: Item, weighted: jax.Array, total: jax.Array) -> None:
    """Writes a consumer's rows, through its queries' memory: by octets, or row by row where an octet is not whole."""
    tile, first_head = item.tile, item.kv_head * spec.group
    first_octet = tile.first_octet + warpgroup * OCTETS
    result = weighted * _across(1 / jnp.maximum(total, 1e-30), spec.head_dim)  # padding has seen nothing
    first_token = tiles.place_octet(spec, first_octet)[0]
    last_token = tiles.place_octet(spec, first_octet + (OCTETS - 1))[0]
    is_whole = (first_token >= tile.start) & (last_token + OCTET <= tile.end)

    @pl.when(is_whole)
    def _():
        refs.rows.at[warpgroup][...] = result.astype(spec.dtype)
        plgpu.commit_smem()
        for octet in range(OCTETS):
            token, head = tiles.place_octet(spec, first_octet + octet)
            rows = refs.rows.at[warpgroup, pl.ds(octet * OCTET, OCTET)]
            plgpu.copy_smem_to_gmem(rows, refs.out.at[pl.ds(token, OCTET), first_head + head])

    @pl.when(jnp.logical_not(is_whole))
    def _():
        refs.plain_rows.at[warpgroup, :, pl.ds(0, spec.head_dim)][...] = result.astype(spec.dtype)
        plgpu.commit_smem()

        def copy_octet(octet: jax.Array, carry: None) -> None:
            token, head = tiles.place_octet(spec, first_octet + octet)

            def copy_row(row: jax.Array, carry: None) -> None:
                values = refs.plain_rows.at[warpgroup, octet * OCTET + row, pl.ds(0, spec.head_dim)]
                plgpu.copy_smem_to_gmem(values, refs.out.at[token + row, first_head + head])

            first_own = jnp.maximum(tile.start - token, 0)
            lax.fori_loop(first_own, jnp.minimum(tile.end - token, OCTET), copy_row, None)

        num_octets = jnp.clip(tiles.end_octet(spec, tile) - first_octet, 0, OCTETS)
        lax.fori_loop(jnp.int32(0), num_octets, copy_octet, None)


def _first_product(spec: Spec, queries: Any, keys: Any, after_issue: Any, softmax: Any) -> tuple[jax.Array, ...]:
    """softmax(queries [64, H] by keys [B, H])."""
    if spec.interpret:
        after_issue()
        return softmax(jnp.dot(queries[...], keys[...].T, preferred_element_type=jnp.float32))

    def multiply(scores: Any) -> tuple[jax.Array, ...]:
        plgpu.wgmma(scores, queries, mosaic.transposed(keys))
        after_issue()
        return softmax(plgpu.wgmma_accumulator_load(scores, wait_n=0))

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, spec.tiling.block_keys), jnp.float32))


def _two_products(
    spec: Spec, operands: tuple[Any, Any, Any], running: _Running, after_issue: Any, softmax: Any
) -> tuple[jax.Array, ...]:
    """The newest values' product, and beside it softmax(queries [64, H] by keys [B, H])."""
    queries, keys, values = operands
    if spec.interpret:
        scores = jnp.dot(queries[...], keys[...].T, preferred_element_type=jnp.float32)
        weighted = _add_product(spec, running.weighted, running.weights, values)
        after_issue()
        return weighted, *softmax(scores)

    def multiply(scores: Any, sums: Any) -> tuple[jax.Array, ...]:
        sums[...] = running.weighted
        plgpu.wgmma(scores, queries, mosaic.transposed(keys))
        plgpu.wgmma(sums, running.weights, values)
        after_issue()
        softened = softmax(plgpu.wgmma_accumulator_load(scores, wait_n=1))
        # Not before the products have ended: the weights' 16-bit form goes where the old ones are being read.
        return lax.optimization_barrier((plgpu.wgmma_accumulator_load(sums, wait_n=0), *softened))

    scores = plgpu.WGMMAAccumulatorRef((ROWS, spec.tiling.block_keys), jnp.float32)
    return pl.run_scoped(multiply, scores, plgpu.WGMMAAccumulatorRef((ROWS, spec.head_dim), jnp.float32))


def _add_product(spec: Spec, weighted: jax.Array, weights: Any, values: Any) -> jax.Array:
    """What was weighted [64, H], and weights [64, B] by values [B, H]."""
    if spec.interpret:
        return weighted + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)

    def multiply(sums: Any) -> jax.Array:
        sums[...] = weighted
        plgpu.wgmma(sums, weights, values)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, spec.head_dim), jnp.float32))


def _across(rows: jax.Array, width: int) -> jax.Array:
    return lax.broadcast_in_dim(rows, (ROWS, width), [0])


def _full(spec: Spec, shape: tuple[int, ...], value: float) -> jax.Array:
    return mosaic.full(shape, value, _layout(shape), spec.interpret)


def _iota(spec: Spec, shape: tuple[int, ...], axis: int) -> jax.Array:
    return mosaic.iota(shape, axis, _layout(shape), spec.interpret)


def _layout(shape: tuple[int, ...]) -> Any:
    return plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
