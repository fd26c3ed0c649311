"""The shapes that steps are padded to, set out in one place: whatever requests come, nothing else is compiled."""

from dataclasses import dataclass
from typing import TypeVar

from miniinfer_jax.config import EngineConfig

SMALLEST_PREFILL = 16
MEDIUM_PREFILL = 1024  # up to here a step is bound by the weights' bytes, and padding is cheap
# Sequences of a step of long chunks: without it, one prompt would pay for the logits of max_num_seqs rows.
FEW_ROWS = 16
# In deterministic mode every step, of prefill and of decode alike, is one program over this many tokens, because
# a matrix product of another height may add in another order.
DETERMINISTIC_TOKENS = 64


@dataclass(frozen=True)
class RaggedBucket:
    """A step over `num_tokens` tokens of at most `num_rows` sequences, which receive at most `num_new_pages` pages.

    is_plain: no sequence asks for more than a temperature (`SamplingParams.is_plain`), so the step has no branches, and
    a GPU replays it as one graph; at a branch the host would wait for the device.
    """

    num_tokens: int
    num_rows: int
    num_new_pages: int
    is_plain: bool = False


@dataclass(frozen=True)
class DecodeBucket:
    """A step over one token of each of `num_rows` sequences; is_plain as in `RaggedBucket`."""

    num_rows: int
    is_plain: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_rows


@dataclass(frozen=True)
class Buckets:
    """Every shape of one engine; no decode buckets in deterministic mode."""

    ragged: tuple[RaggedBucket, ...]
    decode: tuple[DecodeBucket, ...]

    def for_chunks(self, num_tokens: int, num_rows: int, is_plain: bool) -> RaggedBucket:
        """The smallest ragged bucket that holds num_tokens of num_rows sequences, a plain one if it will do."""
        return _smallest(self.ragged, num_tokens, num_rows, is_plain)

    def for_rows(self, num_rows: int, is_plain: bool) -> DecodeBucket:
        """The smallest decode bucket that holds num_rows, a plain one if there is one and it will do."""
        return _smallest(self.decode, num_rows, num_rows, is_plain)


_Bucket = TypeVar("_Bucket", RaggedBucket, DecodeBucket)


def _smallest(buckets: tuple[_Bucket, ...], num_tokens: int, num_rows: int, is_plain: bool) -> _Bucket:
    fitting = [
        bucket
        for bucket in buckets
        if bucket.num_tokens >= num_tokens and bucket.num_rows >= num_rows and (is_plain or not bucket.is_plain)
    ]
    return min(fitting, key=lambda bucket: (bucket.num_tokens, bucket.num_rows, not bucket.is_plain))


def token_budget(config: EngineConfig) -> int:
    """Tokens that one step may carry."""
    return (
        min(config.max_num_batched_tokens, DETERMINISTIC_TOKENS)
        if config.deterministic
        else (config.max_num_batched_tokens)
    )


def choose_buckets(config: EngineConfig, *, with_plain: bool = False) -> Buckets:
    """Ragged steps of 16, 64, 256, 1024, 2048, ... tokens up to the budget, of many and of few sequences; decode steps
    of 1, 4, 16, 32, ... max_num_seqs rows.

    with_plain: plain steps beside them, and of more sizes; the others come in fewer, so that a start compiles little
    more.
    """
    if config.deterministic:
        return Buckets(ragged=(_ragged(config, DETERMINISTIC_TOKENS, config.max_num_seqs),), decode=())
    largest = -(-config.max_num_batched_tokens // SMALLEST_PREFILL) * SMALLEST_PREFILL
    medium = min(largest, MEDIUM_PREFILL)
    tokens = [*_powers(SMALLEST_PREFILL, medium, factor=4), *_powers(medium, largest, factor=2), largest]
    rows = [size for size in _powers(1, config.max_num_seqs, factor=2) if size not in (2, 8)] + [config.max_num_seqs]
    shapes = [_ragged(config, size, config.max_num_seqs) for size in tokens]
    if with_plain:
        tokens = sorted({*tokens, *_powers(4 * SMALLEST_PREFILL, medium, factor=2)})
        shapes += [_ragged(config, size, config.max_num_seqs, is_plain=True) for size in tokens]
    if config.max_num_seqs >= 8 * FEW_ROWS:
        shapes += [_ragged(config, size, FEW_ROWS, is_plain=with_plain) for size in tokens]
    decode = [DecodeBucket(size, is_plain=with_plain) for size in rows]
    if with_plain:
        decode += [DecodeBucket(size) for size in rows[::-1][::2]]
    return Buckets(tuple(dict.fromkeys(shapes)), tuple(decode))


def _ragged(config: EngineConfig, num_tokens: int, max_rows: int, *, is_plain: bool = False) -> RaggedBucket:
    num_rows = min(max_rows, num_tokens)
    # A chunk of n tokens begins at most n // page_size + 1 pages.
    return RaggedBucket(num_tokens, num_rows, num_tokens // config.page_size + num_rows, is_plain)


def _powers(first: int, limit: int, factor: int) -> list[int]:
    """first, first * factor, ... below limit."""
    sizes = []
    while first < limit:
        sizes.append(first)
        first *= factor
    return sizes
