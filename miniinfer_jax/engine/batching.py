"""Between a `StepPlan` and the device: one packed int32 array a step, written with numpy, read again inside jit."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from miniinfer_jax.batch import (
    FLOAT_FIELDS,
    MAX_BAD_WORD_LEN,
    NUM_ROW_PARAMS,
    DecodeInputs,
    DecodeState,
    PrefillInputs,
    unpack_rows,
)
from miniinfer_jax.engine.buckets import DecodeBucket, RaggedBucket
from miniinfer_jax.sampling_params import MAX_INTEGER
from miniinfer_jax.sequence import Chunk, Sequence, StepPlan

NUM_RECENT = MAX_BAD_WORD_LEN - 1
# Columns of a ragged step's rows; the sampling values and the recent tokens follow.
SLOT, QUERY_START, LENGTH, START, IS_DECODE, SAMPLES, NEXT_TOKEN, SCORES_PROMPT = range(8)
NUM_COLUMNS = 8 + NUM_ROW_PARAMS + NUM_RECENT
# What one call of `share_pages` takes: entries of page tables, and copies. Copies are read before any is written.
NUM_SHARED_PAGES = 512
NUM_COPIES = 16


@dataclass(frozen=True)
class CacheShape:
    """What positions in the packed array and in the cache depend on."""

    num_pages: int
    page_size: int
    num_slots: int
    max_pages: int  # a sequence

    @property
    def no_slot(self) -> int:
        """The cache slot past the end, where padding is written to and dropped."""
        return self.num_pages * self.page_size


def row_params(sequence: Sequence) -> list[float | int]:
    """The sampling values of a sequence in the order of RowParams' fields."""
    params = sequence.params
    num_logprobs = 0 if params.logprobs is None else params.logprobs + 1
    floats = [getattr(params, name) for name in FLOAT_FIELDS]
    seed = np.uint32(sequence.seed).view(np.int32)
    first_end = min(sequence.prompt_len + params.min_tokens, MAX_INTEGER)
    return [*floats, max(params.top_k, 0), int(seed), first_end, num_logprobs, int(params.uses_token_rules)]


def recent_tokens(sequence: Sequence) -> list[int]:
    """The newest drawn tokens, newest last, -1 where there are none."""
    newest = sequence.output_token_ids[-NUM_RECENT:]
    return [-1] * (NUM_RECENT - len(newest)) + newest


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None, "a plan holds running sequences only"
    return sequence.slot


def pack_decode(plan: StepPlan, bucket: DecodeBucket, shape: CacheShape) -> np.ndarray:
    """[2, B]: the slot of each row, and the page that begins at its position (num_pages: none)."""
    packed = np.empty((2, bucket.num_rows), np.int32)
    packed[0], packed[1] = shape.num_slots, shape.num_pages
    row_of_slot: dict[int, int] = {}
    for row, chunk in enumerate(plan.chunks):
        row_of_slot[_slot(chunk.sequence)] = row
        packed[0, row] = _slot(chunk.sequence)
    for new_page in plan.new_pages:
        packed[1, row_of_slot[new_page.slot]] = new_page.page
    return packed


def unpack_decode(
    packed: jax.Array, state: DecodeState, shape: CacheShape
) -> tuple[jax.Array, DecodeInputs, DecodeState]:
    """(slots [B], the inputs of the step, the state with the new pages)."""
    slots, new_pages = packed
    is_row = slots < shape.num_slots
    positions = jnp.where(is_row, state.positions[slots], 0)
    columns = jnp.where(new_pages < shape.num_pages, positions // shape.page_size, shape.max_pages)
    state = replace(state, page_table=state.page_table.at[slots, columns].set(new_pages, mode="drop"))
    page_table = state.page_table[slots]
    pages = jnp.take_along_axis(page_table, (positions // shape.page_size)[:, None], axis=1)[:, 0]
    inputs = DecodeInputs(
        token_ids=state.last_tokens[slots],
        positions=positions,
        slots=jnp.where(is_row, pages * shape.page_size + positions % shape.page_size, shape.no_slot),
        context_lens=positions + 1,
        page_table=page_table,
        stops_early=True,
    )
    # Without it every layer would read `packed` itself, and a new array cost XLA an update of its whole CUDA graph.
    return slots, lax.optimization_barrier(inputs), state


def pack_sharing(plan: StepPlan, shape: CacheShape) -> list[np.ndarray]:
    """What must be done before the step, in as many calls as it takes: [3 * NUM_SHARED_PAGES + 2 * NUM_COPIES] each."""
    num_calls = max(-(-len(plan.shared_pages) // NUM_SHARED_PAGES), -(-len(plan.copies) // NUM_COPIES))
    entries = np.full((num_calls, NUM_SHARED_PAGES, 3), shape.num_slots, np.int32)
    copies = np.zeros((num_calls, NUM_COPIES, 2), np.int32)
    copies[..., 1] = shape.num_pages
    for index, entry in enumerate(plan.shared_pages):
        entries[divmod(index, NUM_SHARED_PAGES)] = entry.slot, entry.column, entry.page
    for index, copy in enumerate(plan.copies):
        copies[divmod(index, NUM_COPIES)] = copy.source, copy.target
    return [np.concatenate([one.reshape(-1), two.reshape(-1)]) for one, two in zip(entries, copies, strict=True)]


def unpack_sharing(packed: jax.Array, state: DecodeState) -> tuple[jax.Array, jax.Array, DecodeState]:
    """(sources, targets of the copies [NUM_COPIES], the state with the shared pages in its page table)."""
    entries, copies = jnp.split(packed, [3 * NUM_SHARED_PAGES])
    slots, columns, pages = entries.reshape(NUM_SHARED_PAGES, 3).T
    sources, targets = copies.reshape(NUM_COPIES, 2).T
    return sources, targets, replace(state, page_table=state.page_table.at[slots, columns].set(pages, mode="drop"))


def pack_ragged(plan: StepPlan, bucket: RaggedBucket, shape: CacheShape) -> np.ndarray:
    """One flat array: token ids [T], rows [R, NUM_COLUMNS], new pages [n, 3]. Row r is plan.chunks[r]."""
    tokens = np.zeros(bucket.num_tokens, np.int32)
    rows = np.zeros((bucket.num_rows, NUM_COLUMNS), np.int32)
    rows[:, SLOT], rows[:, QUERY_START] = shape.num_slots, plan.num_tokens
    query_start = 0
    for row, chunk in zip(rows, plan.chunks, strict=False):
        _pack_row(row, chunk, query_start)
        if not chunk.is_decode:
            end = query_start + chunk.length
            tokens[query_start:end] = chunk.sequence.tokens_between(chunk.start, chunk.start + chunk.length)
        query_start += chunk.length
    new_pages = np.full((bucket.num_new_pages, 3), shape.num_slots, np.int32)
    for index, new_page in enumerate(plan.new_pages):
        new_pages[index] = new_page.slot, new_page.column, new_page.page
    return np.concatenate([tokens, rows.reshape(-1), new_pages.reshape(-1)])


def _pack_row(row: np.ndarray, chunk: Chunk, query_start: int) -> None:
    sequence, end = chunk.sequence, chunk.start + chunk.length
    row[SLOT], row[QUERY_START], row[LENGTH], row[START] = _slot(sequence), query_start, chunk.length, chunk.start
    row[IS_DECODE], row[SAMPLES] = chunk.is_decode, chunk.samples
    if chunk.is_decode:
        return  # the slot already holds everything else
    row[SCORES_PROMPT] = sequence.num_unscored > 0
    row[NEXT_TOKEN] = sequence.prompt_token_ids[end] if end < sequence.prompt_len else 0
    first = NUM_COLUMNS - NUM_ROW_PARAMS - NUM_RECENT
    values = row_params(sequence)
    num_floats = len(FLOAT_FIELDS)
    row[first : first + num_floats] = np.array(values[:num_floats], np.float32).view(np.int32)
    row[first + num_floats : first + NUM_ROW_PARAMS] = values[num_floats:]
    row[first + NUM_ROW_PARAMS :] = recent_tokens(sequence)


@dataclass(frozen=True)
class RaggedRows:
    """What a ragged step needs to know of its rows beside the inputs of the forward pass."""

    slots: jax.Array  # [R], num_slots for padding
    last_tokens: jax.Array  # [R], index of each chunk's last token on the flat axis
    samples: jax.Array  # [R] bool
    next_ids: jax.Array  # [T], the token that follows each one in its prompt
    scores_prompt: jax.Array  # [R] bool


def unpack_ragged(
    packed: jax.Array, bucket: RaggedBucket, state: DecodeState, shape: CacheShape
) -> tuple[RaggedRows, PrefillInputs, DecodeState]:
    """(the rows, the inputs of the step, the state with new pages and with the sampling values of new chunks)."""
    num_tokens, num_rows = bucket.num_tokens, bucket.num_rows
    tokens, rows, new_pages = jnp.split(packed, [num_tokens, num_tokens + num_rows * NUM_COLUMNS])
    rows, new_pages = rows.reshape(num_rows, NUM_COLUMNS), new_pages.reshape(-1, 3)
    slots, query_starts, lengths, starts = (rows[:, column] for column in (SLOT, QUERY_START, LENGTH, START))
    is_decode = rows[:, IS_DECODE] == 1

    state = _take_new_rows(state, rows, jnp.where(is_decode, shape.num_slots, slots))
    page_table = state.page_table.at[new_pages[:, 0], new_pages[:, 1]].set(new_pages[:, 2], mode="drop")
    state = replace(state, page_table=page_table)
    # A decoding sequence's token is known to the device alone.
    decode_tokens = jnp.where(is_decode, query_starts, num_tokens)
    tokens = tokens.at[decode_tokens].set(state.last_tokens[slots], mode="drop")

    indices = jnp.arange(num_tokens, dtype=jnp.int32)
    total = jnp.sum(lengths)
    bounds = jnp.append(query_starts, total)
    row_of_token = jnp.clip(jnp.searchsorted(bounds, indices, side="right") - 1, 0, num_rows - 1)
    is_token = indices < total
    positions = jnp.where(is_token, starts[row_of_token] + indices - query_starts[row_of_token], 0)
    row_pages = page_table[slots]  # [R, P]
    pages = row_pages[row_of_token, positions // shape.page_size]
    last_tokens = jnp.maximum(query_starts + lengths - 1, 0)
    chunk_ends = jnp.where(lengths > 0, last_tokens, num_tokens)
    next_ids = jnp.roll(tokens, -1).at[chunk_ends].set(rows[:, NEXT_TOKEN], mode="drop")
    context_lens = starts + lengths
    inputs = PrefillInputs(
        token_ids=tokens,
        positions=positions,
        slots=jnp.where(is_token, pages * shape.page_size + positions % shape.page_size, shape.no_slot),
        query_starts=bounds,
        context_lens=context_lens,
        page_table=row_pages,
        stops_early=True,
    )
    ragged_rows = RaggedRows(slots, last_tokens, rows[:, SAMPLES] == 1, next_ids, rows[:, SCORES_PROMPT] == 1)
    return ragged_rows, inputs, state


def _take_new_rows(state: DecodeState, rows: jax.Array, slots: jax.Array) -> DecodeState:
    """The state with the sampling values and recent tokens of `rows` at `slots`; a slot past the end is dropped."""
    first = NUM_COLUMNS - NUM_ROW_PARAMS - NUM_RECENT
    new_params = unpack_rows(rows[:, first : first + NUM_ROW_PARAMS])
    new_recent = rows[:, first + NUM_ROW_PARAMS :]
    return replace(
        state,
        rows=jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state.rows, new_params),
        recent_tokens=state.recent_tokens.at[slots].set(new_recent, mode="drop"),
    )
