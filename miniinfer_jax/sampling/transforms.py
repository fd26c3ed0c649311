"""The transforms between the model's logits and the draw: each takes logits [B, V] and gives logits [B, V].

A transform is skipped when no row uses it, and changes no bit of the rows that do not use it: which tokens the
neighbours of a row ask for decides how long a step takes, never what the row gets.

Letters: B rows of the step, M slots, V vocabulary, W bad words a request, U tokens a bad word.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from miniinfer_jax.batch import TOKEN_BANNED, TOKEN_ENDS_SEQUENCE, TOKEN_IN_PROMPT, RowParams, SamplingInputs
from miniinfer_jax.sampling.cutoff import lowest_kept

LogitsProcessor = Callable[[jax.Array, SamplingInputs], jax.Array]

# Logits divided by less than this could overflow float32; by then the likeliest token has all of the probability.
LOWEST_TEMPERATURE = 1e-5


def is_greedy(rows: RowParams) -> jax.Array:
    """Which rows [B] take their likeliest token: temperature 0, or too close to 0 to divide by."""
    return rows.temperature < LOWEST_TEMPERATURE


def apply_bias_and_bans(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Logits plus logit_bias, and -inf for each token that the request, min_tokens or a bad word forbids now."""

    def transform(logits: jax.Array) -> jax.Array:
        flags = _of_rows(inputs.rules.flags, inputs)  # [B, V]
        is_too_early = inputs.positions < inputs.rows.first_end_position  # [B]
        ban_bits = jnp.where(is_too_early, TOKEN_BANNED | TOKEN_ENDS_SEQUENCE, TOKEN_BANNED).astype(flags.dtype)
        logits = logits + _of_rows(inputs.rules.bias, inputs)
        logits = jnp.where((flags & ban_bits[:, None]) != 0, -jnp.inf, logits)
        return _ban_bad_words(logits, inputs)

    return _in_rows_using(inputs.rows.has_rules != 0, transform, logits)


def apply_penalties(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Logits less the penalties for tokens that have occurred: repetition, then frequency, then presence.

    Repetition looks at prompt and drawn tokens: a positive logit is divided, another multiplied
    (https://arxiv.org/abs/1909.05858). Frequency (times the count) and presence are subtracted, and look at drawn
    tokens alone, as in OpenAI's API.
    """
    rows = inputs.rows
    is_neutral = (rows.repetition_penalty == 1) & (rows.frequency_penalty == 0) & (rows.presence_penalty == 0)

    def transform(logits: jax.Array) -> jax.Array:
        counts = _of_rows(inputs.rules.counts, inputs)  # [B, V]
        is_drawn = counts > 0
        is_in_prompt = (_of_rows(inputs.rules.flags, inputs) & TOKEN_IN_PROMPT) != 0
        repetition = jnp.where(is_drawn | is_in_prompt, rows.repetition_penalty[:, None], 1.0)  # [B, V]
        logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = logits - rows.frequency_penalty[:, None] * counts
        return logits - rows.presence_penalty[:, None] * is_drawn

    return _in_rows_using((rows.has_rules != 0) & ~is_neutral, transform, logits)


def apply_temperature(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Logits divided by the temperature; greedy rows as they are."""
    # No branch, unlike the others: a division fuses into whatever reads its result, and x / 1 is x.
    temperature = jnp.where(is_greedy(inputs.rows), 1.0, inputs.rows.temperature)
    return logits / temperature[:, None]


def apply_min_p(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Logits of the tokens at least min_p times as probable as the likeliest one; -inf for the rest.

    Source: https://arxiv.org/abs/2407.01082.
    """
    # No branch: finding the maximum takes no longer than the copy that a branch over the logits would make.
    min_p = jnp.where(is_greedy(inputs.rows), 0.0, inputs.rows.min_p)
    lowest = jnp.where(min_p > 0, jnp.max(logits, axis=-1) + jnp.log(min_p), -jnp.inf)  # [B]
    return jnp.where(logits < lowest[:, None], -jnp.inf, logits)


def apply_top_k_and_top_p(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Logits of the top_k likeliest tokens, and of these the fewest that together have top_p; -inf for the rest.

    Tokens as likely as the least likely one kept are kept too, so that no order among equals decides. At least
    one token stays. Source of top_p: https://arxiv.org/abs/1904.09751.
    """
    rows = inputs.rows
    uses_either = ((rows.top_k > 0) & (rows.top_k < logits.shape[-1])) | (rows.top_p < 1)
    uses_either &= ~is_greedy(rows)
    top_k, top_p = jnp.where(uses_either, rows.top_k, 0), jnp.where(uses_either, rows.top_p, 1.0)
    keep_all = jnp.full(top_k.shape, -jnp.inf, jnp.float32)
    lowest = jax.lax.cond(
        jnp.any(uses_either), lambda logits: lowest_kept(logits, top_k, top_p), lambda _: keep_all, logits
    )
    return jnp.where(logits < lowest[:, None], -jnp.inf, logits)


def _in_rows_using(uses: jax.Array, transform: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
    """transform(logits) in the rows where `uses` [B], the very bits of `logits` in the others."""

    def transform_some(logits: jax.Array) -> jax.Array:
        return jnp.where(uses[:, None], transform(logits), logits)

    return jax.lax.cond(jnp.any(uses), transform_some, lambda logits: logits, logits)


def _of_rows(rule: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """The rows [B, ...] of a rule [M, ...]; a padding row gets some other slot's, which it does not use."""
    return rule.at[inputs.slots].get(mode="clip")


def _ban_bad_words(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """-inf for the last token of each bad word whose other tokens have just been drawn."""
    batch_size, vocab_size = logits.shape
    words = _of_rows(inputs.rules.bad_words, inputs)  # [B, W, U]
    beginnings, last_tokens = words[..., :-1], words[..., -1]
    matches = (beginnings == inputs.recent_tokens[:, None, :]) | (beginnings < 0)
    is_banned = jnp.all(matches, axis=-1) & (last_tokens >= 0)  # [B, W]
    columns = jnp.where(is_banned, last_tokens, vocab_size)  # past the end: dropped
    return logits.at[jnp.arange(batch_size)[:, None], columns].set(-jnp.inf, mode="drop")
