"""Attention of one token a sequence over a paged cache, for Hopper GPUs (Pallas, Mosaic GPU).

Letters: B sequences, N query heads, K kv heads, G = N / K, H head dim, P pages, S page size; R = G rounded up to 8.

A program is one warpgroup: a sequence, a kv head and a share ("split") of the context. Blocks of 64 keys with their
values arrive in a ring in shared memory, one copy a page; two or more programs on each multiprocessor hide one
another's start, softmax and end. The G queries of the kv head are the first rows of a tile of 64, the least that the
tensor cores take: the other rows hold anything, and nothing of them is kept. Softmax block by block
(https://arxiv.org/abs/1805.02867). With more than one split each leaves a partial result and the logarithm of its
weight, and a second kernel puts them together (https://pytorch.org/blog/flash-decoding).
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

PAGE_SIZES = (16, 32, 64, 128)
MAX_GROUP = 64
MAX_SPLITS = 128
NUM_MULTIPROCESSORS = 132  # of an H100 or H200 (SXM)

ROWS = 64  # of a tile of queries: what a warpgroup multiplies
BLOCK_KEYS = 64
NUM_STAGES = 2  # more of them were slower: enough programs run on a multiprocessor to keep the memory busy
UNSEEN = -1e30  # finite: the running maximum before the first key
TINY = 1e-20
LOG2_E = math.log2(math.e)
TILE, ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


def unsupported(head_dim: int, page_size: int, num_heads: int, num_kv_heads: int, dtype: Any) -> str | None:
    """Why the kernel cannot run these shapes, with what it takes; None where it can."""
    if reason := mosaic.attention_unsupported(head_dim, page_size, PAGE_SIZES, dtype):
        return reason
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        return f"{num_heads} query heads on {num_kv_heads} kv heads: takes 1 to {MAX_GROUP} query heads a kv head"
    return None


def choose_num_splits(batch: int, num_kv_heads: int, max_len: int, num_sms: int = NUM_MULTIPROCESSORS) -> int:
    """Into how many parts to cut each context: what two programs a multiprocessor leave room for.

    It sees static sizes only, never the lengths: a sequence's splits depend on its own length and this number.
    """
    num_blocks = max(1, -(-max_len // BLOCK_KEYS))
    room = max(1, 2 * num_sms // (batch * num_kv_heads))
    blocks_a_split = -(-num_blocks // min(room, num_blocks, MAX_SPLITS))
    return -(-num_blocks // blocks_a_split)


@functools.partial(jax.jit, static_argnames=("window", "soft_cap", "num_splits", "interpret"))
def paged_decode_attention(
    queries: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    num_splits: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Each query [B, N, H] attends over the last `window` tokens of its sequence, scaled by 1 / sqrt(H) -> [B, N, H].

    pages [P, S, K, 2, H], keys at 0 and values at 1; page_table [B, pages a sequence] and context_lens [B], int32.
    A row of length 0 gives zeros. What lies in a page behind the context, or before the window, is never seen, NaN
    included; entries of the page table behind the context must be page ids, of whatever page. soft_cap: scores
    become soft_cap * tanh(score / soft_cap). Raises ValueError where `unsupported` has a reason. Jitted by itself:
    the layers of a model then share one compiled kernel instead of compiling one each.
    """
    batch, num_heads, head_dim = queries.shape
    _, page_size, num_kv_heads, _, _ = pages.shape
    if pages.dtype != queries.dtype:
        raise ValueError(f"queries are {queries.dtype} and pages {pages.dtype}: paged decode takes one dtype")
    if reason := unsupported(head_dim, page_size, num_heads, num_kv_heads, queries.dtype):
        raise ValueError(f"paged decode attention cannot run {reason}")
    if num_splits is None:
        num_splits = choose_num_splits(batch, num_kv_heads, page_table.shape[1] * page_size)
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits is {num_splits}: takes 1 to {MAX_SPLITS}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: takes 1 and more, or None")
    sizes = (batch, num_heads, num_kv_heads, head_dim, page_size, page_table.shape[1], queries.dtype)
    spec = _Spec(*sizes, window=window, soft_cap=soft_cap, num_splits=num_splits, interpret=interpret)
    return _attend(spec, queries, pages, page_table, context_lens)


class _Spec(NamedTuple):
    """What is fixed when the kernel is compiled."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_pages: int  # a sequence: the width of the page table
    dtype: Any
    window: int | None
    soft_cap: float | None
    num_splits: int
    interpret: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def group_rows(self) -> int:
        return 8 * -(-self.group // 8)  # R: rows of a copy

    @property
    def copy_keys(self) -> int:
        return min(self.page_size, BLOCK_KEYS)

    @property
    def pages_a_block(self) -> int:
        return BLOCK_KEYS // self.copy_keys

    @property
    def padded_head_dim(self) -> int:
        return 128 * -(-self.head_dim // 128)  # of a partial result: a value a thread

    @property
    def padded_splits(self) -> int:
        return 4 * -(-self.num_splits // 4)  # whole 128 bytes of logarithms

    def compiler_options(self) -> dict[str, Any]:
        """Barriers are written out where warps of the warpgroup hand memory to one another."""
        parameters = plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        )
        interpret = {"interpret": mosaic.interpreter()} if self.interpret else {}
        return {"compiler_params": parameters, **interpret}


class _Scratch(NamedTuple):
    """Shared memory of a program. The results lie where the ring was."""

    raw_queries: Any  # [64, H], as they come
    queries: Any  # [64, H], as the tensor cores read them
    ring: Any  # [stages, 64 keys, 2 H]: keys beside their values
    results: Any  # [64, H]
    logs: Any  # [64]
    ring_barriers: Any
    queries_barrier: Any


class _Running(NamedTuple):
    """The state of a softmax computed block by block, float32, logarithms to base 2."""

    weighted: jax.Array  # [64, H]
    maximum: jax.Array  # [64]
    total: jax.Array  # [64]


def _attend(
    spec: _Spec, queries: jax.Array, pages: jax.Array, page_table: jax.Array, context_lens: jax.Array
) -> jax.Array:
    """Starts the kernel, and the one that combines where there is more than one split."""
    flat_queries = queries.reshape(spec.batch * spec.num_heads, spec.head_dim)
    if spec.interpret:  # a copy on the GPU gives zeros outside of an array
        flat_queries = jnp.pad(flat_queries, ((0, spec.group_rows), (0, 0)))
    keys_beside_values = pages.reshape(*pages.shape[:3], 2 * spec.head_dim)
    finished = jax.ShapeDtypeStruct(queries.shape, queries.dtype)
    partial = (spec.batch, spec.num_kv_heads, spec.padded_splits, spec.group_rows)
    unfinished = [
        jax.ShapeDtypeStruct((*partial, spec.padded_head_dim), jnp.float32),
        jax.ShapeDtypeStruct(partial, jnp.float32),
    ]
    is_split = spec.num_splits > 1

    def attend_split(table: Any, lens: Any, flat_queries: Any, pages: Any, *rest: Any) -> None:
        outputs, scratch = (rest[:2], rest[2:]) if is_split else (rest[:1], rest[1:])
        _program(spec, table, lens, flat_queries, pages, outputs, _name_scratch(spec, scratch))

    outputs = plgpu.kernel(
        attend_split,
        out_type=unfinished if is_split else [finished],
        scratch_types=_scratch_types(spec),
        grid=(spec.batch, spec.num_splits, spec.num_kv_heads),  # the heads of a page are read at the same time
        grid_names=("sequence", "split", "kv_head"),
        **spec.compiler_options(),
    )(page_table, context_lens, flat_queries, keys_beside_values)
    return _combine(spec, finished, *outputs) if is_split else outputs[0]


def _scratch_types(spec: _Spec) -> list[Any]:
    head_dim = spec.head_dim
    swizzle = next(size for size in (128, 64, 32) if head_dim * spec.dtype.itemsize % size == 0)
    transforms = (plgpu.TilingTransform((8, swizzle // spec.dtype.itemsize)), plgpu.SwizzleTransform(swizzle))
    queries = plgpu.SMEM((ROWS, head_dim), spec.dtype, transforms=transforms)
    ring = plgpu.SMEM((NUM_STAGES, BLOCK_KEYS, 2 * head_dim), spec.dtype, transforms=transforms)
    raw_queries = plgpu.SMEM((ROWS, head_dim), spec.dtype)
    results = plgpu.SMEM((ROWS, head_dim), spec.dtype if spec.num_splits == 1 else jnp.float32)
    logs = plgpu.SMEM((ROWS,), jnp.float32)
    # The interpreter gives each array its own memory.
    shared = [ring, results, logs] if spec.interpret else [plgpu.RefUnion(ring, [results, logs])]
    ring_barriers = plgpu.Barrier(num_arrivals=spec.pages_a_block, num_barriers=NUM_STAGES)
    return [raw_queries, queries, *shared, ring_barriers, plgpu.Barrier(num_barriers=1)]


def _name_scratch(spec: _Spec, scratch: Any) -> _Scratch:
    if spec.interpret:
        return _Scratch(*scratch)
    raw_queries, queries, (ring, (results, logs)), ring_barriers, queries_barrier = scratch
    return _Scratch(raw_queries, queries, ring, results, logs, ring_barriers, queries_barrier)


def _program(spec: _Spec, table: Any, lens: Any, queries: Any, pages: Any, outputs: Any, scratch: _Scratch) -> None:
    """One split of one kv head of one sequence: every num_splits-th block, so that the first needs no length."""
    sequence, split, kv_head = (lax.axis_index(name) for name in ("sequence", "split", "kv_head"))
    length = lens[sequence]
    start = 0 if spec.window is None else jnp.maximum(length - spec.window, 0)  # the first token that is seen
    first = split + lax.div(start, BLOCK_KEYS)
    num_blocks = lax.div(length + (BLOCK_KEYS - 1), BLOCK_KEYS)
    num_visits = lax.div(num_blocks - first + (spec.num_splits - 1), spec.num_splits)

    def page_ids(visit: jax.Array | int) -> list[jax.Array]:
        """Those of a block: loaded without waiting for the length; behind it the last page again, of the L2 cache."""
        block = first + visit * spec.num_splits
        places = [lax.div(block * BLOCK_KEYS, spec.page_size) + index for index in range(spec.pages_a_block)]
        ids = [table[sequence, jnp.minimum(place, spec.max_pages - 1)] for place in places]
        for index in range(1, spec.pages_a_block):
            ids[index] = jnp.where(places[index] * spec.page_size < length, ids[index], ids[index - 1])
        return ids

    def fetch(visit: jax.Array | int, stage: jax.Array | int, ids: list[jax.Array]) -> None:
        block_start = (first + visit * spec.num_splits) * BLOCK_KEYS
        offset = lax.rem(block_start, spec.page_size) if spec.page_size > BLOCK_KEYS else 0
        for index, page in enumerate(ids):
            plgpu.copy_gmem_to_smem(
                pages.at[page, pl.ds(offset, spec.copy_keys), kv_head],
                scratch.ring.at[stage, pl.ds(index * spec.copy_keys, spec.copy_keys)],
                scratch.ring_barriers.at[stage],
            )

    def visit_block(visit: jax.Array, running: _Running) -> _Running:
        stage = lax.rem(visit, NUM_STAGES)
        next_ids = page_ids(visit + NUM_STAGES)
        plgpu.barrier_wait(scratch.ring_barriers.at[stage])
        keys = scratch.ring.at[stage, :, pl.ds(0, spec.head_dim)]
        values = scratch.ring.at[stage, :, pl.ds(spec.head_dim, spec.head_dim)]
        block_start = (first + visit * spec.num_splits) * BLOCK_KEYS
        is_foreign = block_start + BLOCK_KEYS > length
        if spec.window is not None:
            is_foreign |= block_start < start
        pl.when(is_foreign)(lambda: _clear_foreign(spec, values, block_start, start, length))
        running = _visit(spec, scratch.queries, keys, values, block_start, start, length, running)

        @pl.when(visit + NUM_STAGES < num_visits)
        def _fetch_next() -> None:
            plgpu.commit_smem()  # every warp has read the stage
            fetch(visit + NUM_STAGES, stage, next_ids)

        return running

    first_row = sequence * spec.num_heads + kv_head * spec.group
    plgpu.copy_gmem_to_smem(
        queries.at[pl.ds(first_row, spec.group_rows)],
        scratch.raw_queries.at[pl.ds(0, spec.group_rows)],
        scratch.queries_barrier.at[0],
    )
    first_ids = [page_ids(visit) for visit in range(NUM_STAGES)]
    for visit, ids in enumerate(first_ids):
        pl.when(visit < num_visits)(functools.partial(fetch, visit, visit, ids))
    # A copy into the tensor cores' order can start at multiples of 8 rows only: the queries pass through registers.
    plgpu.barrier_wait(scratch.queries_barrier.at[0])
    scratch.queries[...] = mosaic.load(scratch.raw_queries, TILE, spec.interpret)
    plgpu.commit_smem()

    nothing = _Running(
        mosaic.full((ROWS, spec.head_dim), 0.0, TILE, spec.interpret),
        mosaic.full((ROWS,), UNSEEN, ROW, spec.interpret),
        mosaic.full((ROWS,), 0.0, ROW, spec.interpret),
    )
    running = lax.fori_loop(0, num_visits, visit_block, nothing)
    _write(spec, running, outputs, scratch, (sequence, split, kv_head))


def _clear_foreign(spec: _Spec, values: Any, block_start: jax.Array, start: Any, length: jax.Array) -> None:
    """Zeros the values of a block [64, H] outside of start .. length: 0 * NaN would be NaN."""
    positions = block_start + mosaic.iota((BLOCK_KEYS, spec.head_dim), 0, TILE, spec.interpret)
    is_own = positions < length
    if spec.window is not None:
        is_own &= positions >= start
    own = mosaic.load(values, TILE, spec.interpret)
    values[...] = jnp.where(is_own, own, jnp.zeros_like(own))
    plgpu.commit_smem()


def _visit(
    spec: _Spec,
    queries: Any,
    keys: Any,
    values: Any,
    block_start: jax.Array,
    start: Any,
    length: jax.Array,
    running: _Running,
) -> _Running:
    """The softmax so far and one more block of keys [64, H] and values [64, H]."""
    scale = spec.head_dim**-0.5
    shape = (ROWS, BLOCK_KEYS)
    scores = mosaic.product_transposed(queries, keys, shape, spec.interpret)
    if spec.soft_cap is None:
        scores *= scale * LOG2_E
    else:  # tanh(x) = 1 - 2 / (exp(2 x) + 1): the GPU's own tanh has 11 bits
        exponential = jnp.exp2(scores * (2 * scale / spec.soft_cap * LOG2_E))
        scores = (spec.soft_cap * LOG2_E) * (1 - 2 / (exponential + 1))
    positions = block_start + mosaic.iota(shape, 1, TILE, spec.interpret)
    is_seen = positions < length
    if spec.window is not None:
        is_seen &= positions >= start
    scores = jnp.where(is_seen, scores, UNSEEN)

    maximum = jnp.maximum(running.maximum, scores.max(axis=1))
    rescaling = jnp.exp2(running.maximum - maximum)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(maximum, shape, [0]))
    total = running.total * rescaling + weights.sum(axis=1)
    weighted = running.weighted * lax.broadcast_in_dim(rescaling, (ROWS, spec.head_dim), [0])
    weighted = mosaic.plus_product(weighted, weights.astype(spec.dtype), values, spec.interpret)
    return _Running(weighted, maximum, total)


def _write(spec: _Spec, running: _Running, outputs: Any, scratch: _Scratch, place: tuple[Any, Any, Any]) -> None:
    """The result, or the result of a split and the logarithm of its weight."""
    sequence, split, kv_head = place
    total = jnp.maximum(running.total, TINY)
    results = running.weighted / lax.broadcast_in_dim(total, (ROWS, spec.head_dim), [0])
    plgpu.commit_smem()  # every warp has read the ring, where the results go
    scratch.results[...] = results.astype(scratch.results.dtype)
    if spec.num_splits == 1:
        plgpu.commit_smem()
        target = outputs[0].at[sequence, pl.ds(kv_head * spec.group, spec.group)]
        plgpu.copy_smem_to_gmem(scratch.results.at[pl.ds(0, spec.group)], target)
    else:
        scratch.logs[...] = running.maximum + jnp.log(total) * LOG2_E
        plgpu.commit_smem()
        rows = pl.ds(0, spec.group_rows)
        target = outputs[0].at[sequence, kv_head, split, :, pl.ds(0, spec.head_dim)]
        plgpu.copy_smem_to_gmem(scratch.results.at[rows], target)
        plgpu.copy_smem_to_gmem(scratch.logs.at[rows], outputs[1].at[sequence, kv_head, split])
    plgpu.wait_smem_to_gmem(0)


def _combine(spec: _Spec, finished: Any, partials: jax.Array, logs: jax.Array) -> jax.Array:
    """The splits' results [B, K, splits, R, H] weighed by exp2 of their logarithms [B, K, splits, R] -> [B, N, H]."""
    layout = plgpu.Layout.WG_STRIDED((spec.padded_head_dim,), vec_size=spec.padded_head_dim // 128)

    def combine_splits(
        partials: Any, logs: Any, output: Any, rows: Any, row_logs: Any, result: Any, barrier: Any
    ) -> None:
        sequence, head = lax.axis_index("sequence"), lax.axis_index("head")
        kv_head, row = lax.div(head, spec.group), lax.rem(head, spec.group)
        plgpu.copy_gmem_to_smem(logs.at[sequence, kv_head], row_logs, barrier.at[0])
        plgpu.copy_gmem_to_smem(partials.at[sequence, kv_head, :, row], rows, barrier.at[0])
        plgpu.barrier_wait(barrier.at[0])
        split_logs = [row_logs[split, row] for split in range(spec.num_splits)]
        maximum = functools.reduce(jnp.maximum, split_logs)
        weights = [jnp.exp2(log - maximum) for log in split_logs]
        total = functools.reduce(jnp.add, weights)
        combined = mosaic.full((spec.padded_head_dim,), 0.0, layout, spec.interpret)
        for split, weight in enumerate(weights):
            combined += mosaic.load(rows.at[split], layout, spec.interpret) * weight
        result[...] = (combined / total).astype(spec.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result.at[pl.ds(0, spec.head_dim)], output.at[sequence, head])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        combine_splits,
        out_type=finished,
        scratch_types=[
            plgpu.SMEM((spec.padded_splits, spec.padded_head_dim), jnp.float32),
            plgpu.SMEM((spec.padded_splits, spec.group_rows), jnp.float32),
            plgpu.SMEM((spec.padded_head_dim,), spec.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=1),
        ],
        grid=(spec.batch, spec.num_heads),
        grid_names=("sequence", "head"),
        **spec.compiler_options(),
    )(partials, logs)
