"""The draw: one token a row from its transformed logits.

Letters: B rows, V vocabulary, N blocks of the vocabulary.
"""

import jax
import jax.numpy as jnp

from miniinfer_jax.batch import SamplingInputs
from miniinfer_jax.sampling.transforms import is_greedy

BLOCK = 128  # neighbouring tokens


def draw(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Token ids [B] int32: the likeliest in greedy rows, in the others a draw from softmax(logits [B, V]).

    -1 in a row whose largest logit is not finite: it holds NaN or +inf, or nothing but -inf.

    A block of tokens is drawn by its probability, then a token of the block: N + BLOCK random numbers instead of V.
    Each time the maximum of logarithms plus Gumbel noise is such a draw (https://arxiv.org/abs/1411.0030). The noise
    depends on the row's seed and position alone, so that neither neighbours nor a second computation change it.
    """
    batch_size, vocab_size = logits.shape
    blocks = jnp.pad(logits, ((0, 0), (0, -vocab_size % BLOCK)), constant_values=-jnp.inf)
    blocks = blocks.reshape(batch_size, -1, BLOCK)
    maxima = jnp.max(blocks, axis=-1)  # [B, N]
    # No branch for greedy rows: it would make XLA write the transformed logits out, which takes longer than the sums.
    greedy = is_greedy(inputs.rows)[:, None]
    noise = _gumbel_noise(inputs.rows.seed, inputs.positions, maxima.shape[1] + BLOCK)
    shift = jnp.where(jnp.isneginf(maxima), 0, maxima)  # a block of -inf alone has no mass, and not NaN
    masses = jnp.sum(jnp.exp(blocks - shift[:, :, None]), axis=-1)  # [B, N]
    scores = jnp.where(greedy, maxima, jnp.log(masses) + shift + noise[:, BLOCK:])
    block = jnp.argmax(scores, axis=-1)  # [B], the first of equals
    tokens = jnp.take_along_axis(blocks, block[:, None, None], axis=1, mode="clip")[:, 0]  # [B, BLOCK]
    tokens = jnp.where(greedy, tokens, tokens + noise[:, :BLOCK])
    token = (block * BLOCK + jnp.argmax(tokens, axis=-1)).astype(jnp.int32)
    return jnp.where(jnp.isfinite(jnp.max(maxima, axis=-1)), token, -1)


def _gumbel_noise(seeds: jax.Array, positions: jax.Array, size: int) -> jax.Array:
    """Standard Gumbel noise [B, size] float32, row b from fold_in(key(seeds[b]), positions[b])."""

    def noise_of_row(seed: jax.Array, position: jax.Array) -> jax.Array:
        # Generator and precision are named because a result must not depend on jax's configuration.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (size,), jnp.float32, mode="high")

    return jax.vmap(noise_of_row)(jax.lax.bitcast_convert_type(seeds, jnp.uint32), positions)
