"""What crosses into jit and back: the inputs of a forward pass, the state of the slots, the results of a step.

Letters: T tokens of a step, R sequences of a ragged step, B sequences of a decode step, M slots (max_num_seqs),
P pages a sequence, S page size, V vocabulary, W bad words a request, U tokens a bad word.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

MAX_BAD_WORDS = 32  # of several tokens; single tokens are TOKEN_BANNED and unlimited
MAX_BAD_WORD_LEN = 8
MAX_LOGPROBS = 20

# Bits of TokenRules.flags
TOKEN_IN_PROMPT = 1
TOKEN_BANNED = 2
TOKEN_ENDS_SEQUENCE = 4  # banned until min_tokens have been drawn


@struct.dataclass
class PrefillInputs:
    """A ragged batch: chunk r is tokens [query_starts[r], query_starts[r+1]) of the flat axis, in order of position.

    Keys up to and with each token's own position are attended to, through row r of the page table. Padding
    tokens lie behind query_starts[R] and write to a slot past the end. stops_early: the loop over keys ends with the
    longest row, for serving; else it goes over the whole page table and can be differentiated.
    """

    token_ids: jax.Array  # [T] int32
    positions: jax.Array  # [T] int32
    slots: jax.Array  # [T] int32, where in the cache each token's key and value go
    query_starts: jax.Array  # [R + 1] int32
    context_lens: jax.Array  # [R] int32, keys of the sequence when this chunk is written
    page_table: jax.Array  # [R, P] int32
    stops_early: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class DecodeInputs:
    """One token a sequence; row b attends to context_lens[b] keys through row b of the page table."""

    token_ids: jax.Array  # [B] int32
    positions: jax.Array  # [B] int32
    slots: jax.Array  # [B] int32
    context_lens: jax.Array  # [B] int32
    page_table: jax.Array  # [B, P] int32
    stops_early: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class RowParams:
    """The sampling values of each row; every one an array, so that a new value compiles nothing."""

    temperature: jax.Array  # [B] float32, 0 is greedy
    top_p: jax.Array  # [B] float32
    min_p: jax.Array  # [B] float32
    presence_penalty: jax.Array  # [B] float32
    frequency_penalty: jax.Array  # [B] float32
    repetition_penalty: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32, 0 keeps all
    seed: jax.Array  # [B] int32, the bits of an unsigned seed
    first_end_position: jax.Array  # [B] int32, before this position an end-of-sequence token is banned
    num_logprobs: jax.Array  # [B] int32, 0: none; k + 1: the chosen token's and the k likeliest
    has_rules: jax.Array  # [B] int32, 1 if the slot's row of TokenRules holds (else it is stale)


FLOAT_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
INT_FIELDS = ("top_k", "seed", "first_end_position", "num_logprobs", "has_rules")
NUM_ROW_PARAMS = len(FLOAT_FIELDS) + len(INT_FIELDS)


@struct.dataclass
class TokenRules:
    """What a request says about single tokens of the vocabulary; a slot's row holds only while has_rules is 1."""

    counts: jax.Array  # [M, V] int32, times drawn so far
    flags: jax.Array  # [M, V] uint8, bits TOKEN_*
    bias: jax.Array  # [M, V] float32, added to the logits
    bad_words: jax.Array  # [M, W, U] int32, right-aligned, padded on the left with -1; all -1 is no word


@struct.dataclass
class SamplingInputs:
    """What a sampler may look at beside the logits: one row a sequence, and the rules of all slots."""

    rows: RowParams
    positions: jax.Array  # [B] int32, the position that the drawn token will have
    recent_tokens: jax.Array  # [B, U - 1] int32, the newest drawn tokens, newest last, -1 where there are none
    slots: jax.Array  # [B] int32, M for padding
    rules: TokenRules


@struct.dataclass
class DecodeState:
    """What the device remembers of each slot between steps; donated, updated in place.

    `last_tokens` feed the next decode step before the host has read them.
    """

    last_tokens: jax.Array  # [M] int32
    positions: jax.Array  # [M] int32, the position of last_tokens
    page_table: jax.Array  # [M, P] int32
    recent_tokens: jax.Array  # [M, U - 1] int32
    rows: RowParams  # [M]
    rules: TokenRules


@struct.dataclass
class StepOutput:
    """What a step gives back for each of its rows; `scores` only from programs that can be asked for them."""

    token_ids: jax.Array  # [B] or longer, int32; -1: nothing could be drawn, the row's logits held NaN
    scores: "TokenScores | None" = None  # [B], of the drawn tokens
    prompt_scores: "TokenScores | None" = None  # [T], of the token that follows each token in its prompt


@struct.dataclass
class TokenScores:
    """How likely the model itself, before any transform, found each of N tokens; zeros where nobody asked."""

    logprobs: jax.Array  # [N, 1 + MAX_LOGPROBS] float32, the token's own, then the likeliest in order
    logprob_ids: jax.Array  # [N, 1 + MAX_LOGPROBS] int32
    ranks: jax.Array  # [N] int32, of the token itself, 1 is the likeliest


def no_scores(num_tokens: int) -> TokenScores:
    """The scores of tokens of which nobody asked."""
    return TokenScores(
        logprobs=jnp.zeros((num_tokens, 1 + MAX_LOGPROBS), jnp.float32),
        logprob_ids=jnp.zeros((num_tokens, 1 + MAX_LOGPROBS), jnp.int32),
        ranks=jnp.zeros((num_tokens,), jnp.int32),
    )


def unpack_rows(packed: jax.Array) -> RowParams:
    """The sampling values from packed int32 rows [B, NUM_ROW_PARAMS], float32 ones as their bits."""
    floats = jax.lax.bitcast_convert_type(packed[:, : len(FLOAT_FIELDS)], jnp.float32)
    ints = packed[:, len(FLOAT_FIELDS) :]
    values = {name: floats[:, column] for column, name in enumerate(FLOAT_FIELDS)}
    values |= {name: ints[:, column] for column, name in enumerate(INT_FIELDS)}
    return RowParams(**values)


def create_state(num_slots: int, max_pages: int, vocab_size: int) -> DecodeState:
    """The state of `num_slots` empty slots."""
    rules = TokenRules(
        counts=jnp.zeros((num_slots, vocab_size), jnp.int32),
        flags=jnp.zeros((num_slots, vocab_size), jnp.uint8),
        bias=jnp.zeros((num_slots, vocab_size), jnp.float32),
        bad_words=jnp.full((num_slots, MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, jnp.int32),
    )
    return DecodeState(
        last_tokens=jnp.zeros((num_slots,), jnp.int32),
        positions=jnp.zeros((num_slots,), jnp.int32),
        page_table=jnp.zeros((num_slots, max_pages), jnp.int32),
        recent_tokens=jnp.full((num_slots, MAX_BAD_WORD_LEN - 1), -1, jnp.int32),
        rows=unpack_rows(jnp.zeros((num_slots, NUM_ROW_PARAMS), jnp.int32)),
        rules=rules,
    )


def fresh_inputs(token_ids: jax.Array, page_size: int) -> PrefillInputs:
    """The inputs of B whole sequences [B, L] in fresh pages, b's first page being b * ceil(L / S).

    For training and scoring without an engine: the cache needs B * ceil(L / S) pages.
    """
    batch_size, length = token_ids.shape
    pages_each = -(-length // page_size)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))  # [B, L]
    first_slots = np.arange(batch_size, dtype=np.int32)[:, None] * pages_each * page_size
    page_table = np.arange(batch_size * pages_each, dtype=np.int32).reshape(batch_size, pages_each)
    return PrefillInputs(
        token_ids=token_ids.reshape(-1).astype(jnp.int32),
        positions=jnp.asarray(positions.reshape(-1)),
        slots=jnp.asarray((first_slots + positions).reshape(-1)),
        query_starts=jnp.arange(batch_size + 1, dtype=jnp.int32) * length,
        context_lens=jnp.full((batch_size,), length, jnp.int32),
        page_table=jnp.asarray(page_table),
    )
