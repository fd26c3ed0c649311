"""The least likely token that top-k and top-p keep, without a sort, on any device.

Letters: B rows, V vocabulary, N blocks of the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

DIGIT_BITS = 3  # of a value that one pass over the logits settles; the first pass settles what is left over of 32
BLOCK = 1024  # neighbouring tokens
SIGN = np.uint32(1 << 31)
KEY_OF_MINUS_INF = np.uint32(0x007FFFFF)


def lowest_kept(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The lowest of logits [B, V] float32 that a row keeps -> [B] float32; -inf keeps all.

    top_k [B] int32 keeps all below 1 and from V on, top_p [B] float32 from 1 on. top_p is of what top_k keeps. Equals
    of the lowest are kept, so both rules ask for the lowest value with less than some weight above it: top_k weighs
    every token 1, top_p by its probability.
    """
    vocab_size = logits.shape[-1]
    uses_top_k = (top_k > 0) & (top_k < vocab_size)
    uses_top_p = top_p < 1
    bottom = jnp.full(top_k.shape, KEY_OF_MINUS_INF)

    def cut_by_k() -> jax.Array:
        cut = _lowest_below(_to_keys(logits), jnp.ones_like(logits), top_k.astype(jnp.float32))
        return jnp.where(uses_top_k, jnp.maximum(cut, bottom), bottom)

    cut = jax.lax.cond(jnp.any(uses_top_k), cut_by_k, lambda: bottom)

    def cut_by_p() -> jax.Array:
        keys = _to_keys(logits)  # here again: a branch gets its inputs through memory, and these are cheap to compute
        chances = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        chances = jnp.where(keys < cut[:, None], 0.0, chances)
        lowest = _lowest_below(keys, chances, top_p * jnp.sum(chances, axis=-1))
        return jnp.where(uses_top_p, jnp.maximum(cut, lowest), cut)

    return _to_floats(jax.lax.cond(jnp.any(uses_top_p), cut_by_p, lambda: cut))


def _lowest_below(keys: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
    """The lowest key that has less than targets [B] of weights [B, V] above it -> [B] uint32.

    It is the highest key that has, with itself, at least the target: digit by digit, from the first on.
    """
    keys, weights = _in_blocks(keys), _in_blocks(weights)  # [B, N, BLOCK]; padding weighs nothing
    num_passes = 32 // DIGIT_BITS

    def settle_digit(index: jax.Array | int, lowest: jax.Array, largest: int = 2**DIGIT_BITS - 1) -> jax.Array:
        shift = jnp.uint32(DIGIT_BITS) * jnp.uint32(num_passes - index)
        candidates = lowest + (jnp.arange(1, largest + 1, dtype=jnp.uint32) << shift)[:, None]  # [digits, B]
        # Each sum in two steps, the second for all digits together: a GPU would take a kernel for each.
        parts = [jnp.sum(jnp.where(keys >= key[:, None, None], weights, 0.0), axis=-1) for key in candidates]
        is_reached = jnp.sum(jnp.stack(parts), axis=-1) >= targets  # [digits, B]
        return lowest + (jnp.sum(is_reached, axis=0, dtype=jnp.uint32) << shift)

    def settle_rest(lowest: jax.Array, unroll: bool) -> jax.Array:
        return jax.lax.fori_loop(1, num_passes + 1, settle_digit, lowest, unroll=unroll)

    first = settle_digit(0, jnp.zeros(targets.shape, jnp.uint32), largest=2 ** (32 % DIGIT_BITS) - 1)
    # On a GPU, the host would be asked whether a loop goes on; on a CPU, a loop compiles faster.
    return jax.lax.platform_dependent(
        first,
        cpu=functools.partial(settle_rest, unroll=False),
        default=functools.partial(settle_rest, unroll=True),
    )


def _in_blocks(values: jax.Array) -> jax.Array:
    """[B, V] -> [B, N, BLOCK], padded with zeros."""
    batch_size, vocab_size = values.shape
    return jnp.pad(values, ((0, 0), (0, -vocab_size % BLOCK))).reshape(batch_size, -1, BLOCK)


def _to_keys(logits: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the float32 logits; both zeros are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
    return jnp.where(bits >= SIGN, ~bits, bits | SIGN)


def _to_floats(keys: jax.Array) -> jax.Array:
    bits = jnp.where(keys >= SIGN, keys ^ SIGN, ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
