import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.batch import MAX_LOGPROBS, TOKEN_BANNED, TOKEN_ENDS_SEQUENCE, TOKEN_IN_PROMPT
from miniinfer_jax.sampling import sample, sample_plain, score_tokens

SAMPLE = jax.jit(sample, static_argnames="logits_processors")
VOCAB = 101


def random_logits(num_rows, vocab_size=VOCAB, seed=0):
    return (np.random.default_rng(seed).normal(size=(num_rows, vocab_size)) * 3).astype(np.float32)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.fixture
def mixed_inputs(make_inputs):
    """Twelve rows, each with another mix of parameters, rules that are stale in every third, and one greedy row."""
    num_rows = 12
    rng = np.random.default_rng(4)
    index = np.arange(num_rows)
    kinds = np.array([0, TOKEN_IN_PROMPT, TOKEN_BANNED, TOKEN_ENDS_SEQUENCE])
    return make_inputs(
        num_rows,
        VOCAB,
        positions=rng.integers(5, 50, num_rows),
        recent_tokens=[4, 5],
        counts=rng.integers(0, 2, (num_rows, VOCAB)),
        flags=rng.choice(kinds, (num_rows, VOCAB), p=[0.6, 0.2, 0.1, 0.1]),
        bias=rng.normal(size=(num_rows, VOCAB)),
        bad_words=[[4, 5, 6], [5, 7], [1, 8]],
        temperature=np.where(index == 3, 0.0, rng.uniform(0.3, 1.5, num_rows)),
        top_p=np.where(index % 2, 1.0, 0.8),
        top_k=np.where(index % 4, 0, 10),
        min_p=np.where(index % 5, 0.0, 0.05),
        repetition_penalty=np.where(index % 3, 1.2, 1.0),
        frequency_penalty=np.where(index % 2, 0.5, 0.0),
        presence_penalty=np.where(index % 2, 0.0, 0.5),
        seed=rng.integers(0, 2**31, num_rows),
        first_end_position=20,
        num_logprobs=np.where(index % 2, 5, 0),
        has_rules=np.where(index % 3, 1, 0),
    )


def assert_same_bits(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_row_gets_the_same_bits_whoever_its_neighbours_are(mixed_inputs, take_rows):
    """Every row first among neutral neighbours, then among all the others in several orders, at the same B."""
    logits = random_logits(12)
    together = SAMPLE(logits, mixed_inputs)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(12)
        permuted = SAMPLE(logits[order], take_rows(mixed_inputs, order))
        assert_same_bits(permuted, jax.tree.map(lambda leaf, order=order: leaf[order], together))
    for row in range(12):
        order = np.full(12, row)
        repeated = SAMPLE(logits[order], take_rows(mixed_inputs, order))
        assert_same_bits(repeated, jax.tree.map(lambda leaf, order=order: leaf[order], together))


def test_a_row_of_nan_is_reported_and_disturbs_nobody(mixed_inputs):
    logits = random_logits(12)
    clean = SAMPLE(logits, mixed_inputs)
    assert (np.asarray(clean.token_ids) >= 0).all()
    bad_rows = np.array([1, 4, 6, 9])
    logits[1], logits[4, 17], logits[6, 3], logits[9] = np.nan, np.nan, np.inf, -np.inf
    result = SAMPLE(logits, mixed_inputs)
    good_rows = np.setdiff1d(np.arange(12), bad_rows)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(result.token_ids) == -1), bad_rows)
    assert_same_bits(*(jax.tree.map(lambda leaf: leaf[good_rows], output) for output in (result, clean)))
    assert (np.asarray(result.token_ids) < VOCAB).all()


def test_a_row_without_any_allowed_token_is_not_finite(make_inputs):
    inputs = make_inputs(3, VOCAB, flags=TOKEN_BANNED, has_rules=[1, 0, 0])
    assert (np.asarray(SAMPLE(random_logits(3), inputs).token_ids) >= 0).tolist() == [False, True, True]


def test_the_draw_follows_all_transforms_together(make_inputs):
    """Chi-square of a whole chain: tokens 0 to 9 with a bias, a ban, a penalty, a temperature, top_k and top_p."""
    num_rows = 10_000
    logits = np.linspace(2, -2, 10)
    flags, bias, counts = np.zeros(10, int), np.zeros(10), np.zeros(10, int)
    flags[1], bias[9], counts[0] = TOKEN_BANNED, 4.0, 2
    inputs = make_inputs(
        num_rows,
        10,
        flags=flags,
        bias=bias,
        counts=counts,
        has_rules=1,
        frequency_penalty=0.5,
        temperature=0.8,
        top_k=6,
        top_p=0.9,
        positions=np.arange(num_rows),
    )
    logits_of_rows = np.broadcast_to(logits.astype(np.float32), (num_rows, 10))
    counts_of_tokens = np.bincount(np.asarray(SAMPLE(logits_of_rows, inputs).token_ids), minlength=10)

    transformed = (logits + bias - 0.5 * counts) / 0.8
    transformed[1] = -np.inf
    order = np.argsort(-transformed)[:6]
    chances = np.exp(log_softmax(transformed[order]))
    num_kept = int((np.cumsum(chances) - chances < 0.9).sum())
    kept, chances = order[:num_kept], chances[:num_kept] / chances[:num_kept].sum()
    assert 3 <= num_kept < 6 and counts_of_tokens[kept].sum() == num_rows
    expected = chances * num_rows
    # 99.9% quantile of the chi-square distribution with 4 degrees of freedom, the most there can be
    assert ((counts_of_tokens[kept] - expected) ** 2 / expected).sum() < 18.47


def test_logprobs_are_those_of_the_unmodified_logits(make_inputs):
    logits = random_logits(3)
    inputs = make_inputs(3, VOCAB, num_logprobs=[6, 0, 1], temperature=0.3, bias=np.arange(VOCAB), has_rules=1)
    result = jax.tree.map(np.asarray, SAMPLE(logits, inputs))
    expected = log_softmax(logits)
    for row in (0, 2):
        ids = result.scores.logprob_ids[row]
        assert ids[0] == result.token_ids[row]
        np.testing.assert_array_equal(ids[1:], np.argsort(-logits[row], kind="stable")[:MAX_LOGPROBS])
        np.testing.assert_allclose(result.scores.logprobs[row], expected[row, ids], atol=1e-5)
        assert result.scores.ranks[row] == 1 + (expected[row] > expected[row, ids[0]]).sum()
    assert not any(values[1].any() for values in jax.tree.leaves(result.scores))
    nothing_asked = SAMPLE(logits, inputs.replace(rows=inputs.rows.replace(num_logprobs=np.zeros(3, np.int32))))
    assert not np.asarray(nothing_asked.scores.logprobs).any()
    np.testing.assert_array_equal(nothing_asked.token_ids, result.token_ids)


def test_scores_of_given_tokens():
    logits = random_logits(9)
    logits[4, :5] = logits[4].max() + 1  # five tokens share the first rank
    next_ids = np.array([0, 100, 50, 3, 4, 7, 8, 9, 10], np.int32)
    scores = jax.tree.map(np.asarray, jax.jit(score_tokens)(logits, next_ids))
    expected = log_softmax(logits)
    np.testing.assert_allclose(scores.logprobs[:, 0], expected[np.arange(9), next_ids], atol=1e-5)
    np.testing.assert_array_equal(scores.logprob_ids[:, 0], next_ids)
    np.testing.assert_array_equal(scores.ranks, 1 + (logits > logits[np.arange(9), next_ids][:, None]).sum(axis=-1))
    assert scores.ranks[4] == 1
    np.testing.assert_allclose(scores.logprobs[:, 1:], -np.sort(-expected)[:, :MAX_LOGPROBS], atol=1e-5)


def test_a_small_vocabulary_pads_the_likeliest_tokens():
    scores = jax.tree.map(np.asarray, jax.jit(score_tokens)(random_logits(2, 7), np.array([0, 6], np.int32)))
    assert scores.logprobs.shape == (2, 1 + MAX_LOGPROBS)
    assert sorted(scores.logprob_ids[0, 1:8]) == list(range(7))
    assert (scores.logprob_ids[:, 8:] == -1).all() and np.isneginf(scores.logprobs[:, 8:]).all()


def test_the_users_processors_run_after_penalties_and_before_temperature(make_inputs):
    logits = random_logits(2)
    traces = []

    def only_token_7_if_penalized(given, inputs):
        traces.append(given.shape)
        is_as_expected = jnp.abs(given - (logits - 1)) < 1e-5
        return jnp.where(is_as_expected & (jnp.arange(VOCAB) == 7), given, -jnp.inf)

    inputs = make_inputs(2, VOCAB, counts=1, presence_penalty=1.0, has_rules=1, temperature=0.5)
    result = SAMPLE(logits, inputs, logits_processors=(only_token_7_if_penalized,))
    assert np.asarray(result.token_ids).tolist() == [7, 7]

    # Other values of every kind compile nothing, and without the penalty the processor bans every token.
    other_inputs = make_inputs(2, VOCAB, temperature=0.0, top_k=3, top_p=0.5, min_p=0.1, num_logprobs=4)
    other = SAMPLE(logits, other_inputs, logits_processors=(only_token_7_if_penalized,))
    assert (np.asarray(other.token_ids) == -1).all()
    assert len(traces) == 1


def test_a_processor_that_yields_nan_ends_only_its_row(make_inputs):
    def spoil_first_row(logits, inputs):
        return logits.at[0, 3].set(jnp.nan)

    result = SAMPLE(random_logits(2), make_inputs(2, VOCAB), logits_processors=(spoil_first_row,))
    assert (np.asarray(result.token_ids) >= 0).tolist() == [False, True]


@pytest.mark.parametrize("spoil", [lambda logits, _: logits[0], lambda logits, _: logits.astype(jnp.bfloat16)])
def test_a_processor_that_changes_shape_or_dtype_is_refused(make_inputs, spoil):
    with pytest.raises(ValueError, match="must keep shape and dtype"):
        SAMPLE(random_logits(2), make_inputs(2, VOCAB), logits_processors=(spoil,))


def test_a_plain_step_draws_what_the_whole_chain_draws(make_inputs):
    inputs = make_inputs(6, VOCAB, temperature=np.array([0.0, 0.5, 1.0, 0.0, 2.0, 0.7]), seed=np.arange(6))
    logits = random_logits(6)
    logits[3, 5], logits[4, 7], logits[5] = np.nan, np.inf, -np.inf
    whole, plain = SAMPLE(logits, inputs), jax.jit(sample_plain)(logits, inputs)
    assert (np.asarray(plain.token_ids) >= 0).tolist() == [True, True, True, False, False, False]
    np.testing.assert_array_equal(whole.token_ids, plain.token_ids)
