"""The programs of the engine, as pure functions: a ragged step, a decode step, and the sharing of pages before either.
`runner.py` compiles them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import DecodeState, SamplingInputs, StepOutput, TokenScores, no_scores
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.engine.batching import CacheShape, RaggedRows, unpack_decode, unpack_ragged, unpack_sharing
from miniinfer_jax.engine.buckets import RaggedBucket
from miniinfer_jax.kv_cache import KVCache
from miniinfer_jax.models.decoder import DecoderParams, forward, logits
from miniinfer_jax.ops.attention import AttentionBackend
from miniinfer_jax.sampling.sample import sample, sample_plain, score_tokens

LogitsProcessor = Callable[[jax.Array, SamplingInputs], jax.Array]
StepResult = tuple[KVCache, DecodeState, StepOutput]

SCORE_BLOCK = 16  # tokens whose logits over the vocabulary are held at a time while a prompt is scored


@dataclass(frozen=True)
class StepContext:
    """What both programs are specialised on; static under jit."""

    config: ModelConfig
    shape: CacheShape
    backend: AttentionBackend
    logits_processors: tuple[LogitsProcessor, ...]


def decode_step(
    context: StepContext,
    is_plain: bool,
    params: DecoderParams,
    cache: KVCache,
    state: DecodeState,
    packed: jax.Array,
    outbox: jax.Array,
) -> StepResult:
    """The next token of each row; its last token comes from the state, where the new one is left.

    outbox: longer than B, donated; its first entries become the
    tokens. XLA keeps temporaries in an output of its own making, and would have to update most of its CUDA graph when
    the next step's output lies elsewhere; in an array that must keep its end it keeps none.
    """
    slots, inputs, state = unpack_decode(packed, state, context.shape)
    hidden, cache = forward(context.config, params, cache, inputs, context.backend)
    state, output = _draw(context, params, state, hidden, slots, inputs.positions + 1, is_plain)
    return cache, state, replace(output, token_ids=outbox.at[: len(slots)].set(output.token_ids))


def ragged_step(
    context: StepContext,
    bucket: RaggedBucket,
    params: DecoderParams,
    cache: KVCache,
    state: DecodeState,
    packed: jax.Array,
) -> StepResult:
    """The chunks of several sequences, decoding ones among them; a row that samples leaves its token in the state."""
    rows, inputs, state = unpack_ragged(packed, bucket, state, context.shape)
    hidden, cache = forward(context.config, params, cache, inputs, context.backend)
    slots = jnp.where(rows.samples, rows.slots, context.shape.num_slots)
    last_hidden = hidden[rows.last_tokens]
    state, output = _draw(context, params, state, last_hidden, slots, inputs.context_lens, bucket.is_plain)
    if not bucket.is_plain:
        output = replace(output, prompt_scores=_score_prompts(params, hidden, rows))
    return cache, state, output


def share_pages(cache: KVCache, state: DecodeState, packed: jax.Array) -> tuple[KVCache, DecodeState]:
    """The cache with pages copied, and the page tables with pages that hold tokens already."""
    sources, targets, state = unpack_sharing(packed, state)
    with jax.named_scope("copy_pages"):
        layers = tuple(kv_cache.copy_pages(pages, sources, targets) for pages in cache.layers)
    return replace(cache, layers=layers), state


def _draw(
    context: StepContext,
    params: DecoderParams,
    state: DecodeState,
    hidden: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    is_plain: bool,
) -> tuple[DecodeState, StepOutput]:
    """Draws the tokens that follow hidden [B, D], to stand at `positions`, and leaves them in the state at `slots`."""
    inputs = SamplingInputs(
        # Padding rows read zeros: greedy and without rules, so that they ask for no work.
        rows=jax.tree.map(lambda values: values.at[slots].get(mode="fill", fill_value=0), state.rows),
        positions=positions,
        recent_tokens=state.recent_tokens[slots],
        slots=slots,
        rules=state.rules,
    )
    with jax.named_scope("sample"):
        scores = logits(params, hidden)
        output = sample_plain(scores, inputs) if is_plain else sample(scores, inputs, context.logits_processors)
    tokens = jnp.maximum(output.token_ids, 0)
    recent = jnp.concatenate([inputs.recent_tokens[:, 1:], tokens[:, None]], axis=1)
    counts = state.rules.counts.at[slots, tokens].add(1, mode="drop")
    state = replace(
        state,
        last_tokens=state.last_tokens.at[slots].set(tokens, mode="drop"),
        positions=state.positions.at[slots].set(positions, mode="drop"),
        recent_tokens=state.recent_tokens.at[slots].set(recent, mode="drop"),
        rules=replace(state.rules, counts=counts),
    )
    return state, output


def _score_prompts(params: DecoderParams, hidden: jax.Array, rows: RaggedRows) -> TokenScores:
    """Log-probabilities of the tokens that follow each token of hidden [T, D]; zeros where no row asks for them."""
    num_tokens = hidden.shape[0]

    def score(_: None) -> TokenScores:
        def score_block(block: tuple[jax.Array, jax.Array]) -> TokenScores:
            return score_tokens(logits(params, block[0]), block[1])

        blocks = (hidden.reshape(-1, SCORE_BLOCK, hidden.shape[1]), rows.next_ids.reshape(-1, SCORE_BLOCK))
        return jax.tree.map(lambda x: x.reshape(num_tokens, *x.shape[2:]), lax.map(score_block, blocks))

    with jax.named_scope("score_prompts"):
        return lax.cond(jnp.any(rows.scores_prompt), score, lambda _: no_scores(num_tokens), None)
