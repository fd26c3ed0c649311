import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.batch import MAX_BAD_WORD_LEN, MAX_BAD_WORDS, RowParams, SamplingInputs, TokenRules

NEUTRAL_ROW = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_k": 0,
    "seed": 0,
    "first_end_position": 0,
    "num_logprobs": 0,
    "has_rules": 0,
}


def _make_inputs(
    num_rows: int,
    vocab_size: int,
    *,
    positions=0,
    recent_tokens=(),
    counts=0,
    flags=0,
    bias=0.0,
    bad_words=(),
    **row_values,
) -> SamplingInputs:
    """Inputs of rows in slots 0, 1, ...; a value may be one for all rows or an array with one entry a row.

    `recent_tokens` and `bad_words` (lists of token ids) are those of every row.
    """
    rows = {}
    for name, neutral in NEUTRAL_ROW.items():
        dtype = np.float32 if isinstance(neutral, float) else np.int32
        rows[name] = jnp.asarray(np.broadcast_to(np.asarray(row_values.pop(name, neutral), dtype), (num_rows,)))
    assert not row_values, f"unknown row values {row_values}"

    def rule(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (num_rows, vocab_size)))

    recent = np.full((num_rows, MAX_BAD_WORD_LEN - 1), -1, np.int32)
    recent[:, recent.shape[1] - len(recent_tokens) :] = recent_tokens
    words = np.full((num_rows, MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, np.int32)
    for index, word in enumerate(bad_words):
        words[:, index, MAX_BAD_WORD_LEN - len(word) :] = word
    return SamplingInputs(
        rows=RowParams(**rows),
        positions=jnp.asarray(np.broadcast_to(np.asarray(positions, np.int32), (num_rows,))),
        recent_tokens=jnp.asarray(recent),
        slots=jnp.arange(num_rows, dtype=jnp.int32),
        rules=TokenRules(
            counts=rule(counts, np.int32),
            flags=rule(flags, np.uint8),
            bias=rule(bias, np.float32),
            bad_words=jnp.asarray(words),
        ),
    )


def _take_rows(inputs: SamplingInputs, order) -> SamplingInputs:
    """The inputs of rows `order`; the rules stay in their slots."""
    order = np.asarray(order)
    picked = jax.tree.map(lambda leaf: leaf[order], dataclasses.replace(inputs, rules=None))
    return dataclasses.replace(picked, rules=inputs.rules)


@pytest.fixture(scope="session")
def make_inputs():
    return _make_inputs


@pytest.fixture(scope="session")
def take_rows():
    return _take_rows
