"""A request's rules about single tokens, as the dense rows that the device reads; sent only where there are any."""

from typing import NamedTuple

import numpy as np

from miniinfer_jax.batch import (
    MAX_BAD_WORD_LEN,
    MAX_BAD_WORDS,
    TOKEN_BANNED,
    TOKEN_ENDS_SEQUENCE,
    TOKEN_IN_PROMPT,
)
from miniinfer_jax.sequence import Sequence


class RuleRows(NamedTuple):
    """One slot's row of each array of TokenRules."""

    counts: np.ndarray  # [V] int32
    flags: np.ndarray  # [V] uint8
    bias: np.ndarray  # [V] float32
    bad_words: np.ndarray  # [W, U] int32


def rule_rows(sequence: Sequence, vocab_size: int) -> RuleRows:
    """What the request of `sequence` says about each token, its outputs so far counted."""
    params = sequence.params
    counts = np.bincount(sequence.output_token_ids, minlength=vocab_size).astype(np.int32)
    flags = np.zeros(vocab_size, np.uint8)
    flags[sequence.prompt_token_ids] |= TOKEN_IN_PROMPT
    flags[list(sequence.stop_token_ids)] |= TOKEN_ENDS_SEQUENCE
    if params.allowed_token_ids is not None:
        is_banned = np.ones(vocab_size, bool)
        is_banned[list(params.allowed_token_ids)] = False
        flags[is_banned] |= TOKEN_BANNED
    bias = np.zeros(vocab_size, np.float32)
    for token_id, value in (params.logit_bias or {}).items():
        bias[token_id] = value
    bad_words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, np.int32)
    flags[[word[0] for word in sequence.bad_words if len(word) == 1]] |= TOKEN_BANNED
    for row, word in enumerate(word for word in sequence.bad_words if len(word) > 1):
        bad_words[row, MAX_BAD_WORD_LEN - len(word) :] = word
    return RuleRows(counts, flags, bias, bad_words)
