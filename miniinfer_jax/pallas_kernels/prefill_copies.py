"""The memory of a program of flash attention for prefill, and the warpgroup that fills it (Pallas, Mosaic GPU).

Letters as in flash_prefill.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from miniinfer_jax.pallas_kernels import prefill_tiles as tiles
from miniinfer_jax.pallas_kernels.prefill_tiles import OCTET, OCTETS, Spec, Tile, div, rem

ROWS = OCTET * OCTETS
NUM_PROGRAMS = 132  # multiprocessors of an H100 or H200 (SXM)


def num_programs(spec: Spec) -> int:
    return 2 if spec.interpret else NUM_PROGRAMS


class Refs(NamedTuple):
    """The memory of a program."""

    work: Any  # [W, 5] of Tile
    num_tiles: Any  # [1]
    page_table: Any
    queries: Any  # [T, N, H]
    pages: Any
    out: Any  # [T, N, H]
    rows: Any  # [C, 64, H], queries and then results
    plain_rows: Any  # [C, 64, >= H], results that are not swizzled
    keys: Any  # [stages, B, H]
    values: Any  # [stages, B, H]
    queries_ready: Any
    queries_free: Any
    keys_ready: Any
    values_ready: Any
    keys_free: Any
    values_free: Any
    turns: Any


def make_scratch(spec: Spec) -> list[Any]:
    tiling, num_consumers = spec.tiling, spec.tiling.num_consumers
    swizzle = next(size for size in (128, 64, 32) if spec.head_dim * 2 % size == 0)  # bytes
    transforms = (plgpu.TilingTransform((OCTET, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    pitch = -(-spec.head_dim // 64) * 64  # where single rows are copied: each starts at a multiple of 128 bytes
    rows = plgpu.SMEM((num_consumers, ROWS, spec.head_dim), spec.dtype, transforms=transforms)
    plain = plgpu.SMEM((num_consumers, ROWS, pitch), spec.dtype)
    # The same memory, unless a consumer's plain rows would lie over the next one's queries. The interpreter has none.
    is_shared = pitch == spec.head_dim and not spec.interpret
    both = plgpu.RefUnion(rows, plain) if is_shared else (rows, plain)
    block = plgpu.SMEM((tiling.num_stages, tiling.block_keys, spec.head_dim), spec.dtype, transforms=transforms)
    copies = tiling.block_keys // min(tiling.block_keys, spec.page_size)
    queries_ready = plgpu.Barrier(num_arrivals=spec.tile_octets, num_barriers=1)
    queries_free = plgpu.Barrier(num_arrivals=num_consumers, num_barriers=1)
    ready = plgpu.Barrier(num_arrivals=copies, num_barriers=tiling.num_stages)
    free = plgpu.Barrier(num_arrivals=num_consumers, num_barriers=tiling.num_stages)
    turns = plgpu.Barrier(num_barriers=num_consumers)
    return [both, block, block, queries_ready, queries_free, ready, ready, free, free, turns]


class Item(NamedTuple):
    """What a program does at a time: a tile of a kv head."""

    tile: Tile
    kv_head: jax.Array


def for_each_item(spec: Spec, refs: Refs, visit: Any) -> jax.Array:
    """visit(item, number of blocks before) for each item of a program -> number of blocks.

    Items are dealt to and fro over the programs, the heaviest first: each gets about the same work.
    """
    program, num_all = lax.axis_index("program"), num_programs(spec)
    num_items = refs.num_tiles[0] * spec.num_kv_heads
    full = div(num_items, num_all)

    def place(turn: jax.Array) -> jax.Array:
        return program + rem(turn, 2) * (num_all - 1 - 2 * program)

    def item_of(turn: jax.Array) -> Item:
        number = jnp.minimum(turn * num_all + place(turn), num_items - 1)
        index = div(number, spec.num_kv_heads)
        tile = Tile(*(refs.work[index, field] for field in range(len(Tile._fields))))
        return Item(tile, number - index * spec.num_kv_heads)

    def one(turn: jax.Array, carry: tuple[jax.Array, Item]) -> tuple[jax.Array, Item]:
        num_before, item = carry
        following = item_of(turn + 1)  # on its way while this one is visited
        visit(item, num_before)
        return num_before + tiles.num_blocks(spec, item.tile), following

    num_turns = full + jnp.where(place(full) < num_items - full * num_all, 1, 0)
    num_blocks, _ = lax.fori_loop(jnp.int32(0), num_turns, one, (jnp.int32(0), item_of(jnp.int32(0))))
    return num_blocks


def produce(spec: Spec, refs: Refs) -> None:
    """Copies queries, keys and values of item after item as memory becomes free."""
    tiling = spec.tiling
    num_stages = tiling.num_stages
    copy_keys = min(tiling.block_keys, spec.page_size)

    def visit(item: Item, num_before: jax.Array) -> None:
        tile, kv_head = item

        @pl.when(num_before > 0)
        def _():
            plgpu.barrier_wait(refs.queries_free.at[0])

        last_octet = tiles.end_octet(spec, tile) - 1
        for octet in range(spec.tile_octets):
            token, head = tiles.place_octet(spec, jnp.minimum(tile.first_octet + octet, last_octet))
            rows = octet // OCTETS, pl.ds(octet % OCTETS * OCTET, OCTET)
            plgpu.copy_gmem_to_smem(
                refs.queries.at[pl.ds(token, OCTET), kv_head * spec.group + head],
                refs.rows.at[rows],
                refs.queries_ready.at[0],
            )
        last_block = tiles.end_blocks(spec, tile)[1]
        # Pages in which the tile sees nothing may be anyone's: the nearest page that it sees stands in for them.
        first_page, last_page = tiles.end_pages(spec, tile)

        def copy_block(step: jax.Array, carry: None) -> None:
            number = num_before + step
            slot = rem(number, num_stages)
            start = (last_block - step) * tiling.block_keys
            sources = []
            for part in range(0, tiling.block_keys, copy_keys):
                page = jnp.clip(div(start + part, spec.page_size), first_page, last_page)
                page_id = jnp.clip(refs.page_table[tile.row, page], 0, spec.num_pages - 1)
                sources.append((part, page_id, rem(start + part, spec.page_size)))
            keys = (0, refs.keys, refs.keys_ready, refs.keys_free)
            values = (1, refs.values, refs.values_ready, refs.values_free)
            for side, block, ready, free in (keys, values):
                _wait_until_free(free, number, num_stages)
                for part, page_id, offset in sources:
                    plgpu.copy_gmem_to_smem(
                        refs.pages.at[page_id, pl.ds(offset, copy_keys), kv_head, side],
                        block.at[slot, pl.ds(part, copy_keys)],
                        ready.at[slot],
                    )

        lax.fori_loop(jnp.int32(0), tiles.num_blocks(spec, tile), copy_block, None)

    num_blocks = for_each_item(spec, refs, visit)

    @pl.when(num_blocks > 0)
    def _():
        plgpu.barrier_wait(refs.queries_free.at[0])

    for slot in range(num_stages):
        _wait_until_free(refs.keys_free, num_blocks + slot, num_stages)
        _wait_until_free(refs.values_free, num_blocks + slot, num_stages)


def _wait_until_free(free: Any, number: jax.Array, num_slots: int) -> None:
    """Waits until the slot of the number-th use is given back by the use before."""

    @pl.when(number >= num_slots)
    def _():
        plgpu.barrier_wait(free.at[rem(number, num_slots)])
