"""Each transform against numpy, written from the definition and in float64 where that matters."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniinfer_jax.batch import TOKEN_BANNED, TOKEN_ENDS_SEQUENCE, TOKEN_IN_PROMPT
from miniinfer_jax.sampling.transforms import (
    apply_bias_and_bans,
    apply_min_p,
    apply_penalties,
    apply_temperature,
    apply_top_k_and_top_p,
)

TRANSFORMS = [apply_bias_and_bans, apply_penalties, apply_temperature, apply_min_p, apply_top_k_and_top_p]
jitted = functools.cache(jax.jit)
NUM_ROWS, VOCAB = 4, 200  # the same in most tests, so that a transform compiles once
SMALL_VOCAB = 12


def run(transform, logits, inputs):
    return np.asarray(jitted(transform)(np.asarray(logits, np.float32), inputs))


def random_logits():
    return (np.random.default_rng(0).normal(size=(NUM_ROWS, VOCAB)) * 4).astype(np.float32)


def probabilities(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_bias_is_added_and_banned_tokens_are_minus_infinity(make_inputs):
    logits = random_logits()
    bias = np.random.default_rng(1).normal(size=(NUM_ROWS, VOCAB)).astype(np.float32)
    flags = np.zeros((NUM_ROWS, VOCAB), np.uint8)
    flags[:, 3] = TOKEN_BANNED | TOKEN_IN_PROMPT
    flags[:, 4] = TOKEN_IN_PROMPT
    result = run(apply_bias_and_bans, logits, make_inputs(NUM_ROWS, VOCAB, bias=bias, flags=flags, has_rules=1))
    expected = logits + bias
    expected[:, 3] = -np.inf
    np.testing.assert_array_equal(result, expected)


def test_ends_of_sequence_are_banned_before_their_first_position(make_inputs):
    logits = random_logits()
    flags = np.zeros(VOCAB, np.uint8)
    flags[[5, 9]] = TOKEN_ENDS_SEQUENCE
    inputs = make_inputs(NUM_ROWS, VOCAB, flags=flags, has_rules=1, positions=[9, 10, 11, 99], first_end_position=10)
    result = run(apply_bias_and_bans, logits, inputs)
    assert np.isneginf(result[0, [5, 9]]).all() and np.isneginf(result).sum() == 2
    np.testing.assert_array_equal(result[1:], logits[1:])


@pytest.mark.parametrize(
    ("drawn", "banned"),
    [
        ([], []),
        ([1], [2]),
        ([7, 1], [2, 9]),
        ([1, 7], []),
        ([3, 4, 5, 6, 7, 8, 9], [10, 49]),
        ([0, 4, 5, 6, 7, 8, 9], []),
    ],
)
def test_a_bad_word_bans_its_last_token_once_the_others_are_drawn(make_inputs, drawn, banned):
    bad_words = [[1, 2], [7, 1, 9], [3, 4, 5, 6, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8, 9, 49]]
    logits = random_logits()
    inputs = make_inputs(NUM_ROWS, VOCAB, recent_tokens=drawn, bad_words=bad_words, has_rules=1)
    result = run(apply_bias_and_bans, logits, inputs)
    assert np.flatnonzero(np.isneginf(result[0])).tolist() == banned


def test_penalties_follow_their_formulas(make_inputs):
    rng = np.random.default_rng(2)
    logits = random_logits()
    counts = rng.integers(0, 3, (NUM_ROWS, VOCAB))
    flags = rng.integers(0, 2, (NUM_ROWS, VOCAB)) * TOKEN_IN_PROMPT
    repetition = np.array([1.0, 1.3, 0.7, 2.0])[:, None]
    frequency = np.array([0.5, 0.0, -1.0, 2.0])[:, None]
    presence = np.array([0.0, 1.5, -0.5, 0.25])[:, None]
    inputs = make_inputs(
        NUM_ROWS,
        VOCAB,
        counts=counts,
        flags=flags,
        has_rules=1,
        repetition_penalty=repetition[:, 0],
        frequency_penalty=frequency[:, 0],
        presence_penalty=presence[:, 0],
    )
    repetition = np.where((counts > 0) | (flags > 0), repetition, 1.0)
    expected = np.where(logits > 0, logits / repetition, logits * repetition)
    # https://platform.openai.com/docs/guides/text-generation: mu[j] - c[j] * frequency - (c[j] > 0) * presence
    expected = expected - counts * frequency - (counts > 0) * presence
    np.testing.assert_allclose(run(apply_penalties, logits, inputs), expected, rtol=1e-6, atol=1e-6)


def test_temperature_divides_except_in_greedy_rows(make_inputs):
    logits = random_logits()
    result = run(apply_temperature, logits, make_inputs(NUM_ROWS, VOCAB, temperature=[0.0, 1e-30, 0.5, 3.0]))
    np.testing.assert_array_equal(result[:2], logits[:2])
    np.testing.assert_allclose(result[2:], logits[2:] / np.array([[0.5], [3.0]], np.float32), rtol=1e-6)


def test_min_p_keeps_tokens_near_the_likeliest(make_inputs):
    min_p = np.array([0.01, 0.2, 0.9, 1.0], np.float32)
    logits = random_logits()
    result = run(apply_min_p, logits, make_inputs(NUM_ROWS, VOCAB, min_p=min_p))
    chances = probabilities(logits)
    is_kept = chances >= min_p[:, None] * chances.max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(result, np.where(is_kept, logits, -np.inf))


def test_top_k_is_applied_before_top_p(make_inputs):
    logits = np.log([[0.4, 0.3, 0.2, 0.1] + [1e-9] * (SMALL_VOCAB - 4)])
    # Of the two likeliest, the first has 0.4 / 0.7 = 0.57 of the probability: enough for 0.5, not for 0.6.
    for top_p, num_kept in ((0.5, 1), (0.6, 2)):
        result = run(apply_top_k_and_top_p, logits, make_inputs(1, SMALL_VOCAB, top_k=2, top_p=top_p))
        assert np.isfinite(result).sum() == num_kept


def test_tokens_as_likely_as_the_last_one_kept_are_kept(make_inputs):
    unlikely = [-np.inf] * (SMALL_VOCAB - 5)
    logits = [[1, 2, 2, 2, 3, *unlikely]]
    top_k = run(apply_top_k_and_top_p, logits, make_inputs(1, SMALL_VOCAB, top_k=2))
    top_p = run(apply_top_k_and_top_p, logits, make_inputs(1, SMALL_VOCAB, top_p=0.6))
    for result in (top_k, top_p):
        np.testing.assert_array_equal(result, [[-np.inf, 2, 2, 2, 3, *unlikely]])


# Integers make equal logits likely. No st.floats: XLA's threads flush subnormals to zero, which hypothesis refuses.
row_logits = st.lists(
    st.integers(-8, 8) | st.integers(-30_000, 30_000).map(lambda n: n / 1000),
    min_size=SMALL_VOCAB,
    max_size=SMALL_VOCAB,
)


@settings(max_examples=150, deadline=None)
@given(values=row_logits, top_k=st.integers(-1, 14))
def test_top_k_keeps_what_is_at_least_the_kth_value(make_inputs, values, top_k):
    logits = np.asarray([values], np.float32)
    result = run(apply_top_k_and_top_p, logits, make_inputs(1, SMALL_VOCAB, top_k=top_k))
    num_kept = top_k if 0 < top_k < SMALL_VOCAB else SMALL_VOCAB
    kth_value = np.sort(logits[0])[::-1][num_kept - 1]
    np.testing.assert_array_equal(result, np.where(logits >= kth_value, logits, -np.inf))


@settings(max_examples=150, deadline=None)
@given(values=row_logits, top_p=st.integers(1, 1000).map(lambda n: n / 1000))
def test_top_p_keeps_the_fewest_tokens_that_reach_it(make_inputs, values, top_p):
    logits = np.asarray([values], np.float32)
    result = run(apply_top_k_and_top_p, logits, make_inputs(1, SMALL_VOCAB, top_p=top_p))[0]
    is_kept, chances = np.isfinite(result), probabilities(logits)[0]
    assert is_kept.any()
    lowest = logits[0][is_kept].min()
    np.testing.assert_array_equal(is_kept, logits[0] >= lowest)  # the likeliest ones
    np.testing.assert_array_equal(result[is_kept], logits[0][is_kept])
    assert chances[is_kept].sum() >= top_p - 1e-6  # enough
    assert top_p == 1 or chances[logits[0] > lowest].sum() < top_p + 1e-6  # and not without the last


def test_a_row_that_does_not_use_a_transform_keeps_its_bits(make_inputs):
    """Row 0 is neutral, with a stale row of rules; the others make every transform run."""
    logits = random_logits()
    logits[0, :4] = [-0.0, np.inf, -np.inf, np.nan]
    inputs = make_inputs(
        NUM_ROWS,
        VOCAB,
        has_rules=[0, 1, 1, 1],
        counts=2,
        flags=TOKEN_IN_PROMPT | TOKEN_BANNED | TOKEN_ENDS_SEQUENCE,
        bias=1.5,
        bad_words=[[5]],
        first_end_position=100,
        repetition_penalty=2.0,
        frequency_penalty=1.0,
        presence_penalty=1.0,
        temperature=[1.0, 0.5, 0.5, 0.5],
        min_p=[0.0, 0.5, 0.5, 0.5],
        top_k=[0, 3, 3, 3],
        top_p=[1.0, 0.5, 0.5, 0.5],
    )
    for transform in TRANSFORMS:
        result = run(transform, logits, inputs)
        assert result[0].tobytes() == logits[0].tobytes(), transform.__name__
        assert (result[1:] != logits[1:]).any(axis=-1).all(), transform.__name__


def test_neutral_rules_change_nothing(make_inputs):
    logits = random_logits()
    logits[:, :3] = [-0.0, 0.0, -np.inf]
    inputs = make_inputs(NUM_ROWS, VOCAB, has_rules=1, counts=3, flags=TOKEN_IN_PROMPT | TOKEN_ENDS_SEQUENCE)
    for transform in TRANSFORMS:
        np.testing.assert_array_equal(run(transform, logits, inputs), logits)


def test_greedy_rows_are_not_filtered(make_inputs):
    logits = random_logits()
    inputs = make_inputs(NUM_ROWS, VOCAB, temperature=0.0, top_k=1, top_p=0.1, min_p=1.0)
    for transform in (apply_min_p, apply_top_k_and_top_p):
        np.testing.assert_array_equal(run(transform, logits, inputs), logits)


def test_padding_rows_past_the_last_slot_disturb_nobody(make_inputs):
    logits = random_logits()
    inputs = make_inputs(NUM_ROWS, VOCAB, has_rules=[1, 0, 1, 0], bias=1.0, bad_words=[[5]])
    padded = inputs.replace(slots=np.array([0, NUM_ROWS, 2, NUM_ROWS], np.int32))
    result = run(apply_bias_and_bans, logits, padded)
    np.testing.assert_array_equal(result, run(apply_bias_and_bans, logits, inputs))
    np.testing.assert_array_equal(result[[1, 3]], logits[[1, 3]])
