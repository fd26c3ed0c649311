"""Attention over the paged cache in plain XLA: the definition, and what runs where there is no kernel.

Letters: T tokens, R chunks, B sequences, N query heads, K kv heads, G = N / K, H head dim, P pages a
sequence, S page size; W work items of Q queries each (rows); C keys of one block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import DecodeInputs, PrefillInputs

QUERY_BLOCK = 16  # queries a work item: one sequence's, so that they share its keys
MASKED = -1e30  # finite: a fully masked block is then undone exactly by the next rescaling


class Tile(NamedTuple):
    """How much the reference holds at a time: rows (work items or sequences), and keys of each."""

    num_rows: int
    num_keys: int


# All rows at once: an accelerator wants few and large operations.
ALL_ROWS = Tile(num_rows=2**30, num_keys=256)


def decode_reference(
    tile: Tile, queries: jax.Array, pages: jax.Array, inputs: DecodeInputs, window: int | None
) -> jax.Array:
    """Each query [B, N, H] over its sequence's pages, in plain XLA."""
    rows = _Rows(queries[:, None], inputs.positions[:, None], inputs.context_lens, inputs.page_table)
    return _attend(tile, rows, pages, inputs.stops_early, window)[:, 0]


def prefill_reference(
    tile: Tile, queries: jax.Array, pages: jax.Array, inputs: PrefillInputs, window: int | None
) -> jax.Array:
    """Each query [T, N, H] over its sequence's pages, in plain XLA: chunks are cut into work items of Q queries."""
    items = _work_items(inputs)
    positions = jnp.where(items.is_used[:, None], inputs.positions[items.tokens], -1)
    rows = _Rows(queries[items.tokens], positions, inputs.context_lens[items.rows], inputs.page_table[items.rows])
    attended = _attend(tile, rows, pages, inputs.stops_early, window)  # [W, Q, N, H]
    return attended.reshape(-1, *queries.shape[1:])[items.places]


class _Rows(NamedTuple):
    """The queries of each work item, where they stand (-1: nowhere, the item is padding), and what they may see."""

    queries: jax.Array  # [W, Q, N, H]
    positions: jax.Array  # [W, Q]
    context_lens: jax.Array  # [W]
    page_table: jax.Array  # [W, P]


class _WorkItems(NamedTuple):
    rows: jax.Array  # [W], the chunk of each item
    tokens: jax.Array  # [W, Q], the tokens of each item; behind the chunk's end its last one again, never read back
    is_used: jax.Array  # [W]
    places: jax.Array  # [T], where in the flattened [W * Q] each token stands


def _work_items(inputs: PrefillInputs) -> _WorkItems:
    """Cuts every chunk into pieces of at most Q tokens. There are never more than T // Q + R of them."""
    num_tokens, num_rows = inputs.token_ids.shape[0], inputs.context_lens.shape[0]
    num_items = min(num_tokens, num_tokens // QUERY_BLOCK + num_rows)
    starts = inputs.query_starts
    items_before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(-(-jnp.diff(starts) // QUERY_BLOCK))])

    item_ids = jnp.arange(num_items, dtype=jnp.int32)
    rows = jnp.clip(jnp.searchsorted(items_before, item_ids, side="right") - 1, 0, num_rows - 1)
    first_tokens = starts[rows] + (item_ids - items_before[rows]) * QUERY_BLOCK
    tokens = first_tokens[:, None] + jnp.arange(QUERY_BLOCK, dtype=jnp.int32)
    tokens = jnp.clip(jnp.minimum(tokens, starts[rows + 1][:, None] - 1), 0, num_tokens - 1)
    is_used = item_ids < items_before[-1]

    token_ids = jnp.arange(num_tokens, dtype=jnp.int32)
    token_rows = jnp.clip(jnp.searchsorted(starts, token_ids, side="right") - 1, 0, num_rows - 1)
    places = items_before[token_rows] * QUERY_BLOCK + token_ids - starts[token_rows]
    return _WorkItems(rows, tokens, is_used, jnp.clip(places, 0, num_items * QUERY_BLOCK - 1))


class _Running(NamedTuple):
    """The state of a softmax computed block by block (https://arxiv.org/abs/1805.02867), all float32."""

    maximum: jax.Array  # [W, K, Q * G]
    total: jax.Array  # [W, K, Q * G]
    weighted: jax.Array  # [W, K, Q * G, H]


def _attend(tile: Tile, rows: _Rows, pages: jax.Array, stops_early: bool, window: int | None) -> jax.Array:
    """The queries of rows over their pages -> [W, Q, N, H], tile.num_rows rows at a time.

    stops_early: keys are visited up to the longest row of each tile, a loop that cannot be differentiated;
    otherwise over the whole page table.
    """
    num_rows = rows.queries.shape[0]
    if num_rows <= tile.num_rows:
        return _attend_tile(tile, rows, pages, stops_early, window)
    num_tiles = -(-num_rows // tile.num_rows)
    padding = num_tiles * tile.num_rows - num_rows

    def tiled(array: jax.Array) -> jax.Array:
        widths = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, widths).reshape(num_tiles, tile.num_rows, *array.shape[1:])

    tiles = jax.tree.map(tiled, rows._replace(positions=rows.positions + 1))  # padding is position 0: now -1
    attended = lax.map(
        lambda one: _attend_tile(tile, one._replace(positions=one.positions - 1), pages, stops_early, window), tiles
    )
    return attended.reshape(-1, *rows.queries.shape[1:])[:num_rows]


def _attend_tile(tile: Tile, rows: _Rows, pages: jax.Array, stops_early: bool, window: int | None) -> jax.Array:
    """The queries of a tile's rows over their pages -> [W, Q, N, H].

    Keys are visited in blocks of fixed size from position 0 on, so that neither the page table's width nor the
    longest neighbour changes a bit of a query's result: a block behind its own position adds exact zeros.
    """
    queries = rows.queries
    num_items, num_queries, num_heads, head_dim = queries.shape
    page_size, num_kv_heads = kv_cache.sizes(pages)
    group = num_heads // num_kv_heads
    folded = queries.reshape(num_items, num_queries, num_kv_heads, group, head_dim)
    folded = folded.transpose(0, 2, 1, 3, 4).reshape(num_items, num_kv_heads, num_queries * group, head_dim)
    query_positions = jnp.repeat(rows.positions, group, axis=1)[:, None, :, None]  # [W, 1, Q * G, 1]

    num_pages = rows.page_table.shape[1]
    pages_per_block = max(1, min(tile.num_keys // page_size, num_pages))
    num_blocks = -(-num_pages // pages_per_block)
    page_table = jnp.pad(rows.page_table, ((0, 0), (0, num_blocks * pages_per_block - num_pages)))
    block_len = pages_per_block * page_size
    multiply = partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    def visit(block: jax.Array | int, running: _Running) -> _Running:
        page_ids = lax.dynamic_slice_in_dim(page_table, block * pages_per_block, pages_per_block, axis=1)
        keys, values = kv_cache.read(pages, page_ids)  # [W, K, C, H]
        key_positions = block * block_len + jnp.arange(block_len)
        # A page may still hold another sequence's values, and 0 * NaN is NaN.
        is_own = key_positions < rows.context_lens[:, None]  # [W, C]
        values = jnp.where(is_own[:, None, :, None], values, 0)
        # Transposed here, where it joins the gather: XLA's CPU backend is slow at products with a transposed matrix.
        scores = multiply("wkmh,wkhc->wkmc", folded, jnp.swapaxes(keys, 2, 3)) * head_dim**-0.5
        visible = key_positions <= query_positions
        if window is not None:
            visible &= key_positions > query_positions - window
        scores = jnp.where(visible, scores, MASKED)
        maximum = jnp.maximum(running.maximum, scores.max(axis=-1))
        rescale = jnp.exp(running.maximum - maximum)
        weights = jnp.exp(scores - maximum[..., None])
        weighted = multiply("wkmc,wkch->wkmh", weights.astype(values.dtype), values)
        return _Running(
            maximum,
            running.total * rescale + weights.sum(axis=-1),
            running.weighted * rescale[..., None] + weighted,
        )

    rows_shape = (num_items, num_kv_heads, num_queries * group)
    empty = _Running(
        jnp.full(rows_shape, MASKED, jnp.float32),
        jnp.zeros(rows_shape, jnp.float32),
        jnp.zeros((*rows_shape, head_dim), jnp.float32),
    )
    if num_blocks == 1:
        running = visit(0, empty)
    else:
        needed = (jnp.max(rows.positions) + block_len) // block_len if stops_early else num_blocks
        running = lax.fori_loop(0, needed, visit, empty)
    total = jnp.maximum(running.total, 1e-30)  # a tile of padding visits nothing
    attended = (running.weighted / total[..., None]).astype(queries.dtype)
    attended = attended.reshape(num_items, num_kv_heads, num_queries, group, head_dim).transpose(0, 2, 1, 3, 4)
    return attended.reshape(queries.shape)
