import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.sampling.draw import BLOCK, draw
from miniinfer_jax.sampling.transforms import apply_min_p, apply_top_k_and_top_p

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


def documented_draw(logits, seed, position):
    """A block of 128 tokens by the sum of its weights, then a token of the block."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    blocks = np.pad(logits, (0, -len(logits) % BLOCK), constant_values=-np.inf).reshape(-1, BLOCK)
    noise = np.asarray(jax.random.gumbel(key, (BLOCK + len(blocks),), mode="high"))
    block = np.argmax(np.log(np.exp(blocks - logits.max()).sum(axis=-1)) + noise[BLOCK:])
    return block * BLOCK + np.argmax(blocks[block] + noise[:BLOCK])


def test_a_draw_is_that_of_the_documented_key(make_inputs):
    seeds = np.array([0, 5, 5, 2**31, 2**32 - 1], np.uint32)
    positions = np.array([0, 9, 10, 131_071, 3])
    logits = np.random.default_rng(0).integers(-3, 3, (5, VOCAB)).astype(np.float32)
    result = DRAW(logits, make_inputs(5, VOCAB, seed=seeds.view(np.int32), positions=positions))
    for row in range(5):
        assert result[row] == documented_draw(logits[row], seeds[row], positions[row]), row


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 1000])
def test_any_vocabulary_is_drawn_from(make_inputs, vocab_size):
    """The last token has half of the probability, whatever part of a block it lies in."""
    logits = np.zeros((2000, vocab_size), np.float32)
    logits[:, -1] = np.log(max(1, vocab_size - 1))
    token_ids = np.asarray(DRAW(logits, make_inputs(2000, vocab_size, positions=np.arange(2000))))
    assert token_ids.min() >= 0 and token_ids.max() < vocab_size
    assert vocab_size == 1 or abs((token_ids == vocab_size - 1).mean() - 0.5) < 0.05


def test_draws_from_many_blocks_follow_the_sorted_definition(make_inputs):
    """Chi-square of min_p, top_k, top_p and the draw together against probabilities from a sort in float64."""
    vocab_size, top_k, top_p, min_p = 1000, 12, 0.9, 0.05
    logits = (np.random.default_rng(8).normal(size=vocab_size) * 1.5).astype(np.float32)
    order = np.argsort(-logits)
    chances = np.exp(logits[order].astype(np.float64))
    num_kept = min(top_k, int((chances >= min_p * chances[0]).sum()))
    chances = chances[:num_kept] / chances[:num_kept].sum()
    num_kept = int((np.cumsum(chances) - chances < top_p).sum())
    order, chances = order[:num_kept], chances[:num_kept] / chances[:num_kept].sum()
    assert 7 <= num_kept <= 10 and len(set(order // BLOCK)) > 3

    inputs = make_inputs(
        NUM_DRAWS, vocab_size, top_k=top_k, top_p=top_p, min_p=min_p, seed=3, positions=np.arange(NUM_DRAWS)
    )

    @jax.jit
    def restricted_draw(logits):
        logits = jnp.broadcast_to(logits, (NUM_DRAWS, vocab_size))
        return draw(apply_top_k_and_top_p(apply_min_p(logits, inputs), inputs), inputs)

    counts = np.bincount(np.asarray(restricted_draw(logits)), minlength=vocab_size)
    assert counts[order].sum() == NUM_DRAWS
    expected = chances * NUM_DRAWS
    assert ((counts[order] - expected) ** 2 / expected).sum() < CHI_SQUARE_LIMIT


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
