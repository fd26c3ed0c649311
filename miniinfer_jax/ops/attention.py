"""Attention over the paged cache behind one interface; the backends are the rows of `BACKENDS`.

A backend is two functions over arrays: `prefill` for a ragged batch of chunks, `decode` for one token a
sequence. Letters: T tokens, R chunks, B sequences, N query heads, K kv heads, G = N / K, H head dim, P pages a
sequence, S page size; W work items of Q queries each; C keys of one block.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import DecodeInputs, PrefillInputs

logger = logging.getLogger(__name__)

QUERY_BLOCK = 16  # queries a work item: one sequence's, so that they share its keys
KEY_BLOCK = 256  # keys of one turn of the loop
MASKED = -1e30  # finite: a fully masked block is then undone exactly by the next rescaling

PrefillAttention = Callable[[jax.Array, jax.Array, PrefillInputs, int | None], jax.Array]
DecodeAttention = Callable[[jax.Array, jax.Array, DecodeInputs, int | None], jax.Array]


class AttentionBackend(NamedTuple):
    """Both functions take (queries, pages of the layer, inputs, window) and return an array of the queries' shape."""

    name: str
    prefill: PrefillAttention
    decode: DecodeAttention


def attention(
    queries: jax.Array,
    pages: jax.Array,
    inputs: PrefillInputs | DecodeInputs,
    window: int | None,
    backend: AttentionBackend,
) -> jax.Array:
    """Causal attention of queries [T, N, H] over their sequences' pages -> [T, N, H], scaled by 1 / sqrt(H).

    A query at position p sees keys at positions (p - window, p], or [0, p] without a window.
    """
    if isinstance(inputs, PrefillInputs):
        return backend.prefill(queries, pages, inputs, window)
    return backend.decode(queries, pages, inputs, window)


def decode_reference(queries: jax.Array, pages: jax.Array, inputs: DecodeInputs, window: int | None) -> jax.Array:
    """Each query [B, N, H] over its sequence's pages, in plain XLA."""
    rows = _Rows(inputs.positions[:, None], inputs.context_lens, inputs.page_table)
    return _attend(queries[:, None], pages, rows, inputs.longest_context, window)[:, 0]


def prefill_reference(queries: jax.Array, pages: jax.Array, inputs: PrefillInputs, window: int | None) -> jax.Array:
    """Each query [T, N, H] over its sequence's pages, in plain XLA: chunks are cut into work items of Q queries."""
    items = _work_items(inputs)
    rows = _Rows(inputs.positions[items.tokens], inputs.context_lens[items.rows], inputs.page_table[items.rows])
    attended = _attend(queries[items.tokens], pages, rows, inputs.longest_context, window)  # [W, Q, N, H]
    return attended.reshape(-1, *queries.shape[1:])[items.places]


class _Rows(NamedTuple):
    """Where the queries of each work item stand, and what they may see."""

    positions: jax.Array  # [W, Q]
    context_lens: jax.Array  # [W]
    page_table: jax.Array  # [W, P]


class _WorkItems(NamedTuple):
    rows: jax.Array  # [W], the chunk of each item
    tokens: jax.Array  # [W, Q], the tokens of each item; behind the chunk's end: other tokens, never read back
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
    tokens = jnp.clip(tokens, 0, num_tokens - 1)

    token_ids = jnp.arange(num_tokens, dtype=jnp.int32)
    token_rows = jnp.clip(jnp.searchsorted(starts, token_ids, side="right") - 1, 0, num_rows - 1)
    places = items_before[token_rows] * QUERY_BLOCK + token_ids - starts[token_rows]
    return _WorkItems(rows, tokens, jnp.clip(places, 0, num_items * QUERY_BLOCK - 1))


class _Running(NamedTuple):
    """The state of a softmax computed block by block (https://arxiv.org/abs/1805.02867), all float32."""

    maximum: jax.Array  # [W, K, Q * G]
    total: jax.Array  # [W, K, Q * G]
    weighted: jax.Array  # [W, K, Q * G, H]


def _attend(
    queries: jax.Array,
    pages: jax.Array,
    rows: _Rows,
    longest_context: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """queries [W, Q, N, H] over the pages of their rows -> [W, Q, N, H].

    Keys are visited in blocks of fixed size from position 0 on, so that neither the page table's width nor the
    longest neighbour changes a bit of a query's result: a block behind its own position adds exact zeros.
    """
    num_items, num_queries, num_heads, head_dim = queries.shape
    page_size, num_kv_heads = kv_cache.sizes(pages)
    group = num_heads // num_kv_heads
    folded = queries.reshape(num_items, num_queries, num_kv_heads, group, head_dim)
    folded = folded.transpose(0, 2, 4, 1, 3).reshape(num_items, num_kv_heads, head_dim, num_queries * group)
    query_positions = jnp.repeat(rows.positions, group, axis=1)[:, None, None, :]  # [W, 1, 1, Q * G]

    num_pages = rows.page_table.shape[1]
    pages_per_block = max(1, min(KEY_BLOCK // page_size, num_pages))
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
        # Keys stand on the left, so that no operand has to be transposed for the product.
        scores = multiply("wkch,wkhm->wkcm", keys, folded) * head_dim**-0.5
        visible = key_positions[:, None] <= query_positions
        if window is not None:
            visible &= key_positions[:, None] > query_positions - window
        scores = jnp.where(visible, scores, MASKED)
        maximum = jnp.maximum(running.maximum, scores.max(axis=2))
        rescale = jnp.exp(running.maximum - maximum)
        weights = jnp.exp(scores - maximum[:, :, None])
        transposed = jnp.swapaxes(weights, 2, 3).astype(values.dtype)  # [W, K, Q * G, C]
        weighted = multiply("wkmc,wkch->wkmh", transposed, values)
        return _Running(
            maximum,
            running.total * rescale + weights.sum(axis=2),
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
        needed = num_blocks if longest_context is None else -(-longest_context // block_len)
        running = lax.fori_loop(0, needed, visit, empty)
    attended = (running.weighted / running.total[..., None]).astype(queries.dtype)
    attended = attended.reshape(num_items, num_kv_heads, num_queries, group, head_dim).transpose(0, 2, 1, 3, 4)
    return attended.reshape(queries.shape)


BACKENDS: dict[str, AttentionBackend] = {
    "xla": AttentionBackend("xla", prefill_reference, decode_reference),
}


def choose_backend(name: str) -> AttentionBackend:
    """The backend called `name`; "auto" is the best one for this device, logged. ValueError for an unknown one."""
    if name == "auto":
        logger.info("attention backend: xla")
        return BACKENDS["xla"]
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is not known; known: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]
