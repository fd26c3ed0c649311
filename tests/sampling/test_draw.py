import jax
import numpy as np
import pytest

from miniinfer_jax.sampling.draw import draw

DRAW = jax.jit(draw)
# 99.9% quantile of the chi-square distribution with 9 degrees of freedom
CHI_SQUARE_LIMIT = 27.88
NUM_DRAWS = 10_000
VOCAB = 257


def chi_square(token_ids, chances):
    expected = chances * len(token_ids)
    counts = np.bincount(token_ids, minlength=len(chances))
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("varying", ["positions", "seed"])
def test_draws_are_distributed_like_the_softmax(make_inputs, varying):
    chances = np.array([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005])
    logits = np.broadcast_to(np.log(chances).astype(np.float32), (NUM_DRAWS, 10))
    inputs = make_inputs(NUM_DRAWS, 10, **{"positions": 3, "seed": 5, varying: np.arange(NUM_DRAWS)})
    assert chi_square(np.asarray(DRAW(logits, inputs)), chances) < CHI_SQUARE_LIMIT


def test_neighbouring_seeds_and_positions_draw_independently(make_inputs):
    """Of ten equal tokens, two draws from neighbours are the same one in a tenth of the cases."""
    logits = np.zeros((NUM_DRAWS, 10), np.float32)
    positions = np.arange(NUM_DRAWS)
    first = np.asarray(DRAW(logits, make_inputs(NUM_DRAWS, 10, seed=7, positions=positions)))
    next_position = np.asarray(DRAW(logits, make_inputs(NUM_DRAWS, 10, seed=7, positions=positions + 1)))
    next_seed = np.asarray(DRAW(logits, make_inputs(NUM_DRAWS, 10, seed=8, positions=positions)))
    for other in (next_position, next_seed):
        assert abs((first == other).mean() - 0.1) < 0.012


def test_greedy_rows_take_the_first_of_the_likeliest(make_inputs):
    logits = np.array([[1, 3, 3, 2], [-np.inf, -5, -np.inf, -5], [0, 0, 0, 0]], np.float32)
    all_greedy = DRAW(logits, make_inputs(3, 4, temperature=0.0))
    beside_a_draw = DRAW(logits, make_inputs(3, 4, temperature=[0, 0, 1]))
    assert np.asarray(all_greedy).tolist() == [1, 1, 0]
    assert np.asarray(beside_a_draw)[:2].tolist() == [1, 1]


def test_a_draw_is_that_of_the_documented_key(make_inputs):
    seeds = np.array([0, 5, 5, 2**31, 2**32 - 1], np.uint32)
    positions = np.array([0, 9, 10, 131_071, 3])
    logits = np.random.default_rng(0).integers(-3, 3, (5, VOCAB)).astype(np.float32)
    result = DRAW(logits, make_inputs(5, VOCAB, seed=seeds.view(np.int32), positions=positions))
    for row in range(5):
        key = jax.random.fold_in(jax.random.key(seeds[row], impl="threefry2x32"), positions[row])
        assert result[row] == np.argmax(logits[row] + np.asarray(jax.random.gumbel(key, (VOCAB,)))), row


def test_a_row_draws_the_same_alone_and_in_any_batch(make_inputs, take_rows):
    num_rows = 12
    rng = np.random.default_rng(3)
    logits = rng.integers(-3, 3, (num_rows, VOCAB)).astype(np.float32)
    inputs = make_inputs(
        num_rows,
        VOCAB,
        seed=rng.integers(0, 2**31, num_rows),
        positions=rng.integers(0, 4096, num_rows),
        temperature=np.where(np.arange(num_rows) % 4 == 0, 0.0, 1.0),
    )
    together = np.asarray(DRAW(logits, inputs))
    for size in (1, 5):
        order = rng.permutation(num_rows)[:size]
        np.testing.assert_array_equal(DRAW(logits[order], take_rows(inputs, order)), together[order])
