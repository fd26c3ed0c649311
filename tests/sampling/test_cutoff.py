"""The lowest token kept, found without a sort, against the definition by a sort in float64."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniinfer_jax.sampling.cutoff import lowest_kept
from miniinfer_jax.sampling.transforms import apply_min_p, apply_top_k_and_top_p

LOWEST_KEPT = jax.jit(lowest_kept)
NUM_ROWS, VOCAB = 4, 12
ROUNDING = 1e-6  # of float32 sums of probabilities


def assert_is_lowest_kept(lowest, logits, top_k, top_p):
    """`lowest` is the value that the sorted definition gives, up to the rounding of sums next to top_p."""
    vocab_size = len(logits)
    kth = np.sort(logits)[::-1][top_k - 1] if 0 < top_k < vocab_size else -np.inf
    if top_p >= 1:
        assert lowest == kth
        return
    chances = np.where(logits >= kth, np.exp(logits.astype(np.float64) - logits.max()), 0.0)
    chances /= chances.sum()
    kept = logits[logits >= lowest]
    assert lowest >= kth and len(kept) > 0
    assert chances[logits > kept.min()].sum() < top_p + ROUNDING  # not without the last
    if kept.min() > kth:
        assert chances[logits >= kept.min()].sum() >= top_p - ROUNDING  # enough


# Few integers make ties likely. No st.floats: XLA's threads flush subnormals to zero, which hypothesis refuses.
logit = st.integers(-3, 3) | st.integers(-30_000, 30_000).map(lambda n: n / 1000) | st.just(-np.inf) | st.just(-0.0)
row = st.tuples(
    st.lists(logit, min_size=VOCAB, max_size=VOCAB).filter(lambda values: max(values) > -np.inf),
    st.integers(-1, VOCAB + 2),
    st.integers(1, 1100).map(lambda n: n / 1000),
)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(row, min_size=NUM_ROWS, max_size=NUM_ROWS))
def test_any_mix_of_rows(rows):
    logits = np.array([values for values, _, _ in rows], np.float32)
    top_k = np.array([k for _, k, _ in rows], np.int32)
    top_p = np.array([p for _, _, p in rows], np.float32)
    result = np.asarray(LOWEST_KEPT(logits, top_k, top_p))
    for index in range(NUM_ROWS):
        assert_is_lowest_kept(result[index], logits[index], top_k[index], top_p[index])


def make_rows(vocab_size):
    """Normal, flat, all equal, tied, mostly banned, peaked and far negative rows."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=vocab_size)
    rows = [
        normal * 3,
        normal * 0.01,
        np.zeros(vocab_size),
        rng.integers(-3, 3, vocab_size),
        np.where(rng.random(vocab_size) < 0.99, -np.inf, normal),
        np.where(np.arange(vocab_size) == 17, 50, normal),
        -rng.exponential(size=vocab_size) * 20 - 1000,
    ]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("top_k", [0, 1, 5, 2000, 5000])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 0.999, 1.0])
def test_rows_of_all_kinds(top_k, top_p):
    logits = make_rows(5000)
    num_rows = len(logits)
    result = LOWEST_KEPT(logits, np.full(num_rows, top_k), np.full(num_rows, top_p, np.float32))
    for index in range(num_rows):
        assert_is_lowest_kept(np.asarray(result)[index], logits[index], top_k, top_p)


def test_a_row_is_cut_the_same_alone_and_among_others(make_inputs, take_rows):
    """Bit for bit, in batches of other sizes, beside rows that ask for other things or for nothing."""
    logits = np.repeat(make_rows(1000), 2, axis=0)
    num_rows, index = len(logits), np.arange(len(logits))
    inputs = make_inputs(
        num_rows,
        1000,
        top_k=np.where(index % 3, 40, 0),
        top_p=np.where(index % 4, 0.8, 1.0),
        min_p=np.where(index % 5, 0.0, 0.1),
        temperature=np.where(index == 6, 0.0, 1.0),
    )
    restrict = jax.jit(lambda logits, inputs: apply_top_k_and_top_p(apply_min_p(logits, inputs), inputs))
    together = np.asarray(restrict(logits, inputs))
    np.testing.assert_array_equal(together[6], logits[6])
    for order in (*index[:, None], [3, 3, 9], index[::-1], index[4:9]):
        result = np.asarray(restrict(logits[np.asarray(order)], take_rows(inputs, order)))
        assert result.tobytes() == together[np.asarray(order)].tobytes()
