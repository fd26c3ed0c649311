"""The paged cache returns what was written where its page ids say, and nothing else ever changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax import kv_cache
from miniinfer_jax.config import ModelConfig

NUM_PAGES, PAGE_SIZE = 6, 4
CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=16,
    hidden_size=12,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=2,
    ffn_size=8,
    max_position=64,
)


def tokens(num_tokens, seed=0):
    """Keys and values [T, K, H]."""
    values = np.random.default_rng(seed).standard_normal((2, num_tokens, CONFIG.num_kv_heads, CONFIG.head_dim))
    return tuple(jnp.asarray(values.astype(np.float32)))


def read_in_order(pages, page_ids):
    """Keys and values [n * S, K, H] of pages [n]."""
    keys, values = kv_cache.read(pages, jnp.asarray([page_ids]))
    return keys[0].swapaxes(0, 1), values[0].swapaxes(0, 1)


@pytest.fixture
def pages():
    """Those of one layer."""
    return kv_cache.create(CONFIG, NUM_PAGES, PAGE_SIZE, "float32").layers[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_new_cache_is_zeros_and_as_large_as_said(dtype):
    cache = kv_cache.create(CONFIG, NUM_PAGES, PAGE_SIZE, dtype)
    assert len(cache.layers) == CONFIG.num_layers
    assert kv_cache.sizes(cache.layers[0]) == (PAGE_SIZE, CONFIG.num_kv_heads)
    assert all(layer.dtype == jnp.dtype(dtype) and not jnp.any(layer) for layer in cache.layers)
    assert all(layer.shape == kv_cache.layer_shape(CONFIG, NUM_PAGES, PAGE_SIZE) for layer in cache.layers)
    assert sum(layer.nbytes for layer in cache.layers) == NUM_PAGES * kv_cache.page_bytes(CONFIG, PAGE_SIZE, dtype)


def test_what_is_written_is_read_back_in_the_order_of_the_page_ids(pages):
    keys, values = tokens(NUM_PAGES * PAGE_SIZE)
    order = np.random.default_rng(1).permutation(NUM_PAGES)
    slots = (order[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)
    written = kv_cache.write(pages, keys, values, jnp.asarray(slots))
    read_keys, read_values = read_in_order(written, order)
    np.testing.assert_array_equal(read_keys, keys)
    np.testing.assert_array_equal(read_values, values)


def test_pages_are_read_for_many_sequences_at_once(pages):
    keys, values = tokens(NUM_PAGES * PAGE_SIZE)
    written = kv_cache.write(pages, keys, values, jnp.arange(NUM_PAGES * PAGE_SIZE))
    table = jnp.asarray([[0, 5], [2, 2], [4, 1]])
    read_keys, read_values = kv_cache.read(written, table)
    assert read_keys.shape == read_values.shape == (3, CONFIG.num_kv_heads, 2 * PAGE_SIZE, CONFIG.head_dim)
    for row, page_ids in enumerate(table.tolist()):
        for found, expected in zip((read_keys, read_values), (keys, values), strict=True):
            own = np.concatenate([np.asarray(expected)[page * PAGE_SIZE :][:PAGE_SIZE] for page in page_ids])
            np.testing.assert_array_equal(found[row].swapaxes(0, 1), own)


def test_a_slot_past_the_end_is_dropped_and_the_last_slot_stays(pages):
    keys, values = tokens(4)
    end = NUM_PAGES * PAGE_SIZE
    written = kv_cache.write(pages, keys, values, jnp.asarray([end, 3, end + 7, end]))
    all_keys, _ = read_in_order(written, range(NUM_PAGES))
    assert np.flatnonzero(np.any(np.asarray(all_keys), axis=(1, 2))).tolist() == [3]
    np.testing.assert_array_equal(all_keys[3], keys[1])


def test_values_are_kept_in_the_dtype_of_the_cache():
    pages = kv_cache.create(CONFIG, NUM_PAGES, PAGE_SIZE, "bfloat16").layers[0]
    keys, values = tokens(2)
    read_keys, _ = read_in_order(kv_cache.write(pages, keys, values, jnp.asarray([0, 1])), [0])
    assert read_keys.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read_keys[:2], keys.astype(jnp.bfloat16))


def test_donated_pages_are_updated_in_place(pages):
    keys, values = tokens(2)
    write = jax.jit(kv_cache.write, donate_argnums=0)
    address = pages.unsafe_buffer_pointer()
    written = write(pages, keys, values, jnp.asarray([1, 9]))
    assert written.unsafe_buffer_pointer() == address
