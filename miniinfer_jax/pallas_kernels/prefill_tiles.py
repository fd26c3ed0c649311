"""How flash attention cuts ragged chunks into tiles: what a tile is, which keys it sees, the list of all of them.

Letters: T tokens, R chunks, K kv heads, G query heads a kv head, B keys a block, C consumers, W tiles.

A tile is 8 C octets of one kv head. An octet is 8 neighbouring tokens of one query head, the first of them a multiple
of 8: the smallest copy into the swizzled layout of shared memory, and its only places. The G heads of 8 tokens lie next
to one another, so that tiles are dense at any G. Where one chunk ends and the next begins inside of 8 tokens, both have
tiles with the octet, and each keeps the rows of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

OCTET = 8  # tokens
OCTETS = 8  # of a consumer: a warpgroup multiplies 64 rows at a time


class Tiling(NamedTuple):
    """How much a program holds at a time."""

    num_consumers: int  # C
    block_keys: int  # B, a multiple of 64
    num_stages: int  # blocks of keys and values in shared memory
    takes_turns: bool = True  # one consumer multiplies while the others compute their softmax


class Spec(NamedTuple):
    """What is fixed when the kernel is compiled."""

    tiling: Tiling
    group: int  # G
    num_kv_heads: int
    head_dim: int
    dtype: Any
    num_pages: int
    page_size: int
    window: int | None
    soft_cap: float | None
    interpret: bool

    @property
    def tile_octets(self) -> int:
        return self.tiling.num_consumers * OCTETS


class Tile(NamedTuple):
    """A tile's place; scalars inside the kernel, arrays [W] in the list."""

    row: jax.Array  # of the page table
    start: jax.Array  # of the chunk on the axis of tokens
    end: jax.Array  # behind its last token
    context_len: jax.Array
    first_octet: jax.Array  # counted over the axis of tokens, see `place_octet`


def list_tiles(
    spec: Spec, num_tokens: int, query_starts: jax.Array, context_lens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The tiles [W, 5] of a kv head, those with the most keys first, and their number [1].

    Padding is one more chunk, without a context: its tiles write zeros. Comparisons of all with all are cheaper here
    than a sort. The list is equal in every layer of a step: XLA keeps one copy.
    """
    bounds = jnp.concatenate([query_starts, jnp.full(1, num_tokens, jnp.int32)])
    starts, ends = bounds[:-1], bounds[1:]  # [R + 1]
    contexts = jnp.concatenate([context_lens, jnp.zeros(1, jnp.int32)])
    num_rows = starts.shape[0]
    first_octets = div(starts, OCTET) * spec.group
    num_octets = ceil_div(ends, OCTET) * spec.group - first_octets
    tiles = jnp.where(ends > starts, ceil_div(num_octets, spec.tile_octets), 0)
    row_ids = jnp.arange(num_rows, dtype=jnp.int32)
    tiles_behind = jnp.sum(jnp.where(row_ids <= row_ids[:, None], tiles, 0), axis=1, dtype=jnp.int32)

    max_tiles = (num_tokens // OCTET + num_rows) * spec.group // spec.tile_octets + num_rows
    ids = jnp.arange(max_tiles, dtype=jnp.int32)
    rows = jnp.minimum(jnp.sum(tiles_behind <= ids[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    octets = first_octets[rows] + (ids - (tiles_behind - tiles)[rows]) * spec.tile_octets
    tile = Tile(jnp.minimum(rows, num_rows - 2), starts[rows], ends[rows], contexts[rows], octets)
    cost = jnp.where(ids < tiles_behind[-1], num_blocks(spec, tile), 0)
    is_before = (cost > cost[:, None]) | ((cost == cost[:, None]) & (ids < ids[:, None]))
    order = jnp.sum(is_before, axis=1, dtype=jnp.int32)
    listed = jnp.zeros((max_tiles, len(tile)), jnp.int32).at[order].set(jnp.stack(tile, axis=1))
    return listed, tiles_behind[-1:]


def place_octet(spec: Spec, octet: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first token of an octet, and which of the G heads it belongs to."""
    tokens = div(octet, spec.group)
    return tokens * OCTET, octet - tokens * spec.group


def end_octet(spec: Spec, tile: Tile) -> jax.Array:
    """The octet behind the last one of the tile's chunk."""
    return ceil_div(tile.end, OCTET) * spec.group


def end_positions(spec: Spec, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Positions of the chunk's first and last token in the tile (negative in padding)."""
    first_token, _ = place_octet(spec, tile.first_octet)
    last_octet, _ = place_octet(spec, tile.first_octet + (spec.tile_octets - 1))
    before = tile.context_len - tile.end
    return before + jnp.maximum(first_token, tile.start), before + jnp.minimum(last_octet + OCTET, tile.end) - 1


def end_blocks(spec: Spec, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """The first and the last block of keys that a tile sees; padding visits one, and sees nothing of it."""
    return _ends(spec, tile, spec.tiling.block_keys)


def end_pages(spec: Spec, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """The first and the last page, counted from the sequence's start, in which a tile sees keys."""
    return _ends(spec, tile, spec.page_size)


def _ends(spec: Spec, tile: Tile, size: int) -> tuple[jax.Array, jax.Array]:
    first_position, last_position = end_positions(spec, tile)
    last = div(jnp.maximum(last_position, 0), size)
    if spec.window is None:
        return lax.full_like(last, 0), last
    return div(jnp.maximum(first_position - (spec.window - 1), 0), size), last


def num_blocks(spec: Spec, tile: Tile) -> jax.Array:
    first_block, last_block = end_blocks(spec, tile)
    return last_block - first_block + 1


def masked_steps(spec: Spec, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Blocks are visited from the last to the first: masks are needed in steps [0, x) and [y, number of blocks)."""
    first_position, last_position = end_positions(spec, tile)
    first_block, last_block = end_blocks(spec, tile)
    count = last_block - first_block + 1
    first_cut = div(jnp.maximum(first_position + 1, 0), spec.tiling.block_keys)  # what some row does not see to its end
    num_right = jnp.clip(last_block + 1 - first_cut, 1, count)
    if spec.window is None:
        return num_right, count
    first_whole = ceil_div(jnp.maximum(last_position - (spec.window - 1), 0), spec.tiling.block_keys)
    return num_right, jnp.clip(last_block + 1 - first_whole, num_right, count)


def ceil_div(x: jax.Array, y: int) -> jax.Array:
    return div(x + (y - 1), y)


def div(x: jax.Array, y: int) -> jax.Array:
    """x // y of what is not negative: without the steps that a sign needs."""
    return lax.div(x, lax.full_like(x, y))


def rem(x: jax.Array, y: int) -> jax.Array:
    return lax.rem(x, lax.full_like(x, y))
