"""The transforms give what Hugging Face's logits processors give (torch, where it is installed)."""

import functools

import jax
import numpy as np
import pytest

from miniinfer_jax.batch import TOKEN_BANNED, TOKEN_ENDS_SEQUENCE
from miniinfer_jax.sampling.transforms import (
    apply_bias_and_bans,
    apply_min_p,
    apply_penalties,
    apply_temperature,
    apply_top_k_and_top_p,
)

torch = pytest.importorskip("torch")
logits_process = pytest.importorskip("transformers.generation.logits_process")

NUM_ROWS, VOCAB = 4, 200
LOGITS = (np.random.default_rng(0).normal(size=(NUM_ROWS, VOCAB)) * 4).astype(np.float32)


jitted = functools.cache(jax.jit)


def expect(transform, inputs, processor, tokens=((0,),) * NUM_ROWS):
    """transform(LOGITS, inputs) is what `processor` makes of LOGITS after `tokens` (the same number a row)."""
    expected = processor(torch.tensor(tokens), torch.tensor(LOGITS)).numpy()
    result = np.asarray(jitted(transform)(LOGITS, inputs))
    np.testing.assert_array_equal(np.isneginf(result), np.isneginf(expected))
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("penalty", [0.8, 1.2, 2.0])
def test_repetition_penalty(make_inputs, penalty):
    tokens = np.random.default_rng(1).integers(0, VOCAB, (NUM_ROWS, 30))
    prompt, drawn = tokens[:, :20], tokens[:, 20:]
    flags = np.array([np.isin(np.arange(VOCAB), row) for row in prompt])  # TOKEN_IN_PROMPT is 1
    counts = np.array([np.bincount(row, minlength=VOCAB) for row in drawn])
    inputs = make_inputs(NUM_ROWS, VOCAB, flags=flags, counts=counts, has_rules=1, repetition_penalty=penalty)
    expect(apply_penalties, inputs, logits_process.RepetitionPenaltyLogitsProcessor(penalty), tokens)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.5])
def test_temperature(make_inputs, temperature):
    inputs = make_inputs(NUM_ROWS, VOCAB, temperature=temperature)
    expect(apply_temperature, inputs, logits_process.TemperatureLogitsWarper(temperature))


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5])
def test_min_p(make_inputs, min_p):
    inputs = make_inputs(NUM_ROWS, VOCAB, min_p=min_p)
    expect(apply_min_p, inputs, logits_process.MinPLogitsWarper(min_p))


@pytest.mark.parametrize("top_k", [1, 5, 199, 200, 500])
def test_top_k(make_inputs, top_k):
    inputs = make_inputs(NUM_ROWS, VOCAB, top_k=top_k)
    expect(apply_top_k_and_top_p, inputs, logits_process.TopKLogitsWarper(top_k))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p(make_inputs, top_p):
    inputs = make_inputs(NUM_ROWS, VOCAB, top_p=top_p)
    expect(apply_top_k_and_top_p, inputs, logits_process.TopPLogitsWarper(top_p))


@pytest.mark.parametrize("drawn", [[3, 4], [4, 5], [1, 2], [9, 9]])
def test_bad_words(make_inputs, drawn):
    flags = np.zeros(VOCAB, np.uint8)
    flags[7] = TOKEN_BANNED
    inputs = make_inputs(
        NUM_ROWS, VOCAB, flags=flags, recent_tokens=drawn, bad_words=[[4, 5], [3, 4, 6], [9, 9]], has_rules=1
    )
    oracle = logits_process.NoBadWordsLogitsProcessor([[7], [4, 5], [3, 4, 6], [9, 9]], eos_token_id=0)
    expect(apply_bias_and_bans, inputs, oracle, [drawn] * NUM_ROWS)


def test_logit_bias(make_inputs):
    bias = np.zeros(VOCAB, np.float32)
    bias[[3, 8]] = [2.5, -4.0]
    oracle = logits_process.SequenceBiasLogitsProcessor([[[3], 2.5], [[8], -4.0]])
    expect(apply_bias_and_bans, make_inputs(NUM_ROWS, VOCAB, bias=bias, has_rules=1), oracle)


@pytest.mark.parametrize("num_drawn", [0, 2, 3, 4])
def test_min_tokens(make_inputs, num_drawn):
    prompt_len, min_tokens, ends = 5, 3, [11, 12]
    flags = np.zeros(VOCAB, np.uint8)
    flags[ends] = TOKEN_ENDS_SEQUENCE
    position = prompt_len + num_drawn
    inputs = make_inputs(
        NUM_ROWS, VOCAB, flags=flags, has_rules=1, positions=position, first_end_position=prompt_len + min_tokens
    )
    oracle = logits_process.MinNewTokensLengthLogitsProcessor(prompt_len, min_tokens, ends)
    expect(apply_bias_and_bans, inputs, oracle, np.ones((NUM_ROWS, position), np.int64))
