"""The draw: one token a row from its transformed logits."""

import jax
import jax.numpy as jnp

from miniinfer_jax.batch import SamplingInputs
from miniinfer_jax.sampling.transforms import is_greedy


def draw(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Token ids [B] int32: the likeliest in greedy rows, in the others a draw from softmax(logits [B, V]).

    The maximum of logits plus Gumbel noise is such a draw (https://arxiv.org/abs/1411.0030). The noise depends on
    the row's seed and position alone, so that neither neighbours nor a second computation change it.
    """
    rows = inputs.rows

    def add_noise(logits: jax.Array) -> jax.Array:
        noise = _gumbel_noise(rows.seed, inputs.positions, logits.shape[-1])
        return jnp.where(is_greedy(rows)[:, None], logits, logits + noise)

    logits = jax.lax.cond(jnp.all(is_greedy(rows)), lambda logits: logits, add_noise, logits)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _gumbel_noise(seeds: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Standard Gumbel noise [B, V] float32, row b from fold_in(key(seeds[b]), positions[b])."""

    def noise_of_row(seed: jax.Array, position: jax.Array) -> jax.Array:
        # Generator and precision are named because a result must not depend on jax's configuration.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32, mode="low")

    return jax.vmap(noise_of_row)(jax.lax.bitcast_convert_type(seeds, jnp.uint32), positions)
