"""`sample`, the whole way from logits to a step's output, and `score_tokens` for tokens that are given."""

from functools import partial

import jax
import jax.numpy as jnp

from miniinfer_jax.batch import MAX_LOGPROBS, RowParams, SamplingInputs, StepOutput, TokenScores, no_scores
from miniinfer_jax.sampling.draw import draw
from miniinfer_jax.sampling.transforms import (
    LogitsProcessor,
    apply_bias_and_bans,
    apply_min_p,
    apply_penalties,
    apply_temperature,
    apply_top_k_and_top_p,
    is_greedy,
)

# vLLM's order; the user's own processors come between the two.
TRANSFORMS_BEFORE = (apply_bias_and_bans, apply_penalties)
TRANSFORMS_AFTER = (apply_temperature, apply_min_p, apply_top_k_and_top_p)


def sample(
    logits: jax.Array, inputs: SamplingInputs, logits_processors: tuple[LogitsProcessor, ...] = ()
) -> StepOutput:
    """One token a row, drawn from the transformed logits, with log-probabilities of the logits [B, V] float32 as given.

    The token is -1 in a row whose largest logit is not finite, before the transforms or after the user's processors:
    NaN, +inf and a row without any allowed token leave nothing to draw. Raises ValueError, while being traced, for a
    processor that changes shape or dtype.
    """
    if logits_processors:
        token_ids = _draw_transformed(logits, inputs, logits_processors)
    else:
        # One branch for all: each branch that hands on logits costs a copy of them, and a launch.
        token_ids = jax.lax.cond(
            jnp.any(_uses_transforms(inputs.rows)),
            partial(_draw_transformed, inputs=inputs),
            partial(_draw_plain, inputs=inputs),
            logits,
        )
    with jax.named_scope("logprobs"):
        return StepOutput(token_ids, _scores_where_asked(logits, token_ids, inputs.rows.num_logprobs > 0))


def sample_plain(logits: jax.Array, inputs: SamplingInputs) -> StepOutput:
    """`sample` for a step in which no row asks for more than a temperature: the same, without branches."""
    return StepOutput(_draw_plain(logits, inputs))


def _uses_transforms(rows: RowParams) -> jax.Array:
    """Which rows [B] ask for more than a temperature."""
    is_cut = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    return (rows.has_rules != 0) | (is_cut & ~is_greedy(rows))


def _draw_plain(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Token ids [B] where no row asks for more than a temperature."""
    with jax.named_scope("draw"):
        return draw(apply_temperature(logits, inputs), inputs)


def _draw_transformed(
    logits: jax.Array, inputs: SamplingInputs, logits_processors: tuple[LogitsProcessor, ...] = ()
) -> jax.Array:
    """Token ids [B] through the whole chain of transforms."""
    is_finite = _has_finite_maximum(logits)
    for transform in TRANSFORMS_BEFORE:
        with jax.named_scope(transform.__name__):
            logits = transform(logits, inputs)
    for processor in logits_processors:
        with jax.named_scope("logits_processor"):
            logits = _apply_processor(processor, logits, inputs)
    is_finite &= _has_finite_maximum(logits)
    for transform in TRANSFORMS_AFTER:
        with jax.named_scope(transform.__name__):
            logits = transform(logits, inputs)
    with jax.named_scope("draw"):
        return jnp.where(is_finite, draw(logits, inputs), -1)


def score_tokens(logits: jax.Array, next_ids: jax.Array) -> TokenScores:
    """How likely logits [T, V] float32 make the tokens next_ids [T], and which tokens they make the likeliest.

    Rank 1 is the likeliest; equals share a rank. A vocabulary smaller than MAX_LOGPROBS leaves the last entries
    at token -1, log-probability -inf. The sort takes about as much memory as the logits: give few rows at a time.
    """
    num_top = min(MAX_LOGPROBS, logits.shape[-1])
    chosen = jnp.take_along_axis(logits, next_ids[:, None], axis=-1, mode="clip")  # [T, 1]
    top, top_ids = jax.lax.top_k(logits, num_top)  # [T, num_top]
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [T, 1]
    logprobs = jnp.concatenate([chosen, top], axis=-1) - log_total
    ids = jnp.concatenate([next_ids[:, None], top_ids], axis=-1).astype(jnp.int32)
    padding = ((0, 0), (0, MAX_LOGPROBS - num_top))
    return TokenScores(
        logprobs=jnp.pad(logprobs, padding, constant_values=-jnp.inf),
        logprob_ids=jnp.pad(ids, padding, constant_values=-1),
        ranks=1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32),
    )


def _scores_where_asked(logits: jax.Array, token_ids: jax.Array, is_asked: jax.Array) -> TokenScores:
    """The scores of token_ids [B] in the rows that asked for them [B], zeros in the others."""

    def score(logits: jax.Array) -> TokenScores:
        scores = score_tokens(logits, token_ids)
        return TokenScores(
            logprobs=jnp.where(is_asked[:, None], scores.logprobs, 0),
            logprob_ids=jnp.where(is_asked[:, None], scores.logprob_ids, 0),
            ranks=jnp.where(is_asked, scores.ranks, 0),
        )

    def zeros(logits: jax.Array) -> TokenScores:
        return no_scores(logits.shape[0])

    return jax.lax.cond(jnp.any(is_asked), score, zeros, logits)


def _apply_processor(processor: LogitsProcessor, logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """The processor's logits, once they are known to have the shape and dtype of those it was given."""
    result = processor(logits, inputs)
    shape, dtype = jnp.shape(result), jnp.result_type(result)
    if shape != logits.shape or dtype != logits.dtype:
        raise ValueError(
            f"logits processor {processor!r} returned {dtype}{list(shape)} for {logits.dtype}{list(logits.shape)}; "
            "it must keep shape and dtype"
        )
    return result


def _has_finite_maximum(logits: jax.Array) -> jax.Array:
    """Which rows [B] can be drawn from: one pass finds NaN and +inf (a maximum carries both) and rows of only -inf."""
    return jnp.isfinite(jnp.max(logits, axis=-1))
