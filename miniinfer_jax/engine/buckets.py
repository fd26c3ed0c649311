"""The shapes that steps are padded to, set out in one place: whatever requests come, nothing else is compiled."""

from dataclasses import dataclass

from miniinfer_jax.config import EngineConfig

SMALLEST_PREFILL = 16
# In deterministic mode every step, of prefill and of decode alike, is one program over this many tokens, because
# a matrix product of another height may add in another order.
DETERMINISTIC_TOKENS = 64


@dataclass(frozen=True)
class RaggedBucket:
    """A step over `num_tokens` tokens of at most `num_rows` sequences, which receive at most `num_new_pages` pages."""

    num_tokens: int
    num_rows: int
    num_new_pages: int


@dataclass(frozen=True)
class DecodeBucket:
    """A step over one token of each of `num_rows` sequences."""

    num_rows: int


@dataclass(frozen=True)
class Buckets:
    """Every shape of one engine, smallest first; no decode buckets in deterministic mode."""

    ragged: tuple[RaggedBucket, ...]
    decode: tuple[DecodeBucket, ...]

    def for_tokens(self, num_tokens: int) -> RaggedBucket:
        """The smallest ragged bucket that holds num_tokens."""
        return next(bucket for bucket in self.ragged if bucket.num_tokens >= num_tokens)

    def for_rows(self, num_rows: int) -> DecodeBucket:
        """The smallest decode bucket that holds num_rows."""
        return next(bucket for bucket in self.decode if bucket.num_rows >= num_rows)


def token_budget(config: EngineConfig) -> int:
    """Tokens that one step may carry."""
    return (
        min(config.max_num_batched_tokens, DETERMINISTIC_TOKENS)
        if config.deterministic
        else (config.max_num_batched_tokens)
    )


def choose_buckets(config: EngineConfig) -> Buckets:
    """Ragged steps of 16, 64, 256, ... tokens up to the budget; decode steps of 1, 4, 16, 32, ... max_num_seqs rows."""

    def ragged(num_tokens: int) -> RaggedBucket:
        num_rows = min(config.max_num_seqs, num_tokens)
        # A chunk of n tokens begins at most n // page_size + 1 pages.
        return RaggedBucket(num_tokens, num_rows, num_tokens // config.page_size + num_rows)

    if config.deterministic:
        return Buckets(ragged=(ragged(DETERMINISTIC_TOKENS),), decode=())
    largest = -(-config.max_num_batched_tokens // SMALLEST_PREFILL) * SMALLEST_PREFILL
    tokens = [*_powers(SMALLEST_PREFILL, largest, factor=4), largest]
    rows = [size for size in _powers(1, config.max_num_seqs, factor=2) if size not in (2, 8)] + [config.max_num_seqs]
    return Buckets(tuple(ragged(size) for size in tokens), tuple(DecodeBucket(size) for size in rows))


def _powers(first: int, limit: int, factor: int) -> list[int]:
    """first, first * factor, ... below limit."""
    sizes = []
    while first < limit:
        sizes.append(first)
        first *= factor
    return sizes
