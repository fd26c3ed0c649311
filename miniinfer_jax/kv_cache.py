"""The paged key-value cache, and the one file that knows how its pages are laid out."""

import jax
import jax.numpy as jnp
from flax import struct

from miniinfer_jax.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of every layer in pages of `page_size` tokens; slot = page * page_size + offset.

    A page belongs to sequences by their page tables alone, and keeps what its last owner wrote until it is
    overwritten: readers mask what is not theirs, keys and values both.
    """

    layers: tuple[jax.Array, ...]  # one a layer: [num_pages, S, K, 2, H], keys at 0 and values at 1


def sizes(pages: jax.Array) -> tuple[int, int]:
    """(tokens a page, kv heads) of a layer's pages."""
    return pages.shape[1], pages.shape[2]


def layer_shape(config: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
    return (num_pages, page_size, config.num_kv_heads, 2, config.head_dim)


def page_bytes(config: ModelConfig, page_size: int, dtype: str) -> int:
    """Bytes that one page takes over all layers."""
    values = config.num_layers * page_size * config.num_kv_heads * 2 * config.head_dim
    return values * jnp.dtype(dtype).itemsize


def create(config: ModelConfig, num_pages: int, page_size: int, dtype: str) -> KVCache:
    """An empty cache of `num_pages` pages."""
    shape = layer_shape(config, num_pages, page_size)
    return KVCache(layers=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)))


def write(pages: jax.Array, keys: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """A layer's pages with keys and values [T, K, H] at slots [T]; a slot past the end is dropped (padding)."""
    page_size = pages.shape[1]
    both = jnp.stack([keys, values], axis=2).astype(pages.dtype)  # [T, K, 2, H]
    # Without the promise (padding breaks it, and is dropped) a GPU would write 16-bit values by compare-and-swap.
    return pages.at[slots // page_size, slots % page_size].set(both, mode="drop", unique_indices=True)


def take_pages(cache: KVCache, page_ids: jax.Array) -> tuple[jax.Array, ...]:
    """Whole pages [n], one array a layer: [n, S, K, 2, H]; zeros for a page past the end (padding)."""
    return tuple(layer.at[page_ids].get(mode="fill", fill_value=0) for layer in cache.layers)


def put_pages(cache: KVCache, page_ids: jax.Array, pages: tuple[jax.Array, ...]) -> KVCache:
    """The cache with whole pages [n] replaced, by one array a layer: [n, S, K, 2, H]; one past the end is dropped."""
    layers = zip(cache.layers, pages, strict=True)
    return KVCache(
        layers=tuple(layer.at[page_ids].set(values, mode="drop", unique_indices=True) for layer, values in layers)
    )


def take_page(cache: KVCache, page_id: jax.Array) -> jax.Array:
    """One whole page of all layers: [L, S, K, 2, H]."""
    return jnp.stack([layer[page_id] for layer in cache.layers])


def put_page(cache: KVCache, page_id: jax.Array, page: jax.Array) -> KVCache:
    """The cache with one page of all layers replaced; a page past the end is dropped."""
    return KVCache(layers=tuple(layer.at[page_id].set(page[i], mode="drop") for i, layer in enumerate(cache.layers)))


def copy_pages(pages: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    """A layer's pages with what sources [n] held at targets [n]; a target past the end is dropped (padding)."""
    held = pages.at[sources].get(mode="promise_in_bounds")
    return pages.at[targets].set(held, mode="drop", unique_indices=True)


def read(pages: jax.Array, page_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a layer's pages [W, n], each [W, K, n * S, H]: a matrix for each kv head."""
    num_rows, num_pages = page_ids.shape
    _, page_size, num_kv_heads, _, head_dim = pages.shape
    shape = (num_rows, num_kv_heads, num_pages * page_size, head_dim)

    def take(part: int) -> jax.Array:
        # Two gathers, not one that is split: XLA's CPU backend would otherwise gather anew for every element it reads.
        gathered = pages.at[page_ids, :, :, part].get(mode="promise_in_bounds")  # [W, n, S, K, H]
        return gathered.transpose(0, 3, 1, 2, 4).reshape(shape)

    return take(0), take(1)
