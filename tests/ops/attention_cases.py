"""Random ragged batches over a paged cache with everything in it that attention must not see, and a dense oracle."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import DecodeInputs, PrefillInputs
from miniinfer_jax.config import ModelConfig


@dataclass(frozen=True)
class Shape:
    """The sizes of a case. `garbage` is the scale of what lies in slots that no sequence owns."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 4
    max_pages: int = 16
    dtype: str = "float32"
    garbage: float = 100.0


@dataclass(frozen=True)
class Case:
    """Chunks of sequences whose contexts lie in the cache."""

    shape: Shape
    chunks: list[tuple[int, int]]  # (tokens in the cache before, tokens of the chunk) of each row
    queries: jax.Array  # [T, N, H], padding included
    pages: jax.Array  # of one layer
    page_table: jax.Array  # [R, P]
    slots: list[np.ndarray]  # of each row's context
    sequences: list[tuple[np.ndarray, np.ndarray]]  # keys and values [context, K, H] of each row, in float64

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.chunks)

    def prefill_inputs(self, bounded: bool) -> PrefillInputs:
        """The chunks as a ragged batch; `bounded` stops at the longest row."""
        num_padding = self.queries.shape[0] - self.num_tokens
        past_the_end = self.pages.shape[0] * self.shape.page_size
        positions = [np.arange(cached, cached + length) for cached, length in self.chunks]
        slots = [row[cached:] for row, (cached, _) in zip(self.slots, self.chunks, strict=True)]
        return PrefillInputs(
            token_ids=jnp.zeros(self.queries.shape[0], jnp.int32),
            positions=_int32(np.concatenate([*positions, np.zeros(num_padding)])),
            slots=_int32(np.concatenate([*slots, np.full(num_padding, past_the_end)])),
            query_starts=_int32(np.cumsum([0, *(length for _, length in self.chunks)])),
            context_lens=_int32(self.context_lens),
            page_table=self.page_table,
            stops_early=bounded,
        )

    def decode_inputs(self, bounded: bool) -> DecodeInputs:
        """One token a row, at the end of its context."""
        assert all(length == 1 for _, length in self.chunks)
        return DecodeInputs(
            token_ids=jnp.zeros(len(self.chunks), jnp.int32),
            positions=_int32([cached for cached, _ in self.chunks]),
            slots=_int32([row[-1] for row in self.slots]),
            context_lens=_int32(self.context_lens),
            page_table=self.page_table,
            stops_early=bounded,
        )

    @property
    def context_lens(self) -> list[int]:
        return [cached + length for cached, length in self.chunks]


def _int32(values) -> jax.Array:
    return jnp.asarray(np.asarray(values), jnp.int32)


def make_case(shape: Shape, chunks: list[tuple[int, int]], num_padding: int = 0, seed: int = 0) -> Case:
    """Random contents in permuted pages; spare slots and spare entries of the page table hold garbage."""
    generator = np.random.default_rng(seed)
    page_size, max_pages = shape.page_size, shape.max_pages
    num_pages = len(chunks) * max_pages + 3
    page_table = generator.permutation(num_pages)[: len(chunks) * max_pages].reshape(len(chunks), max_pages)
    slots = []
    for row, (cached, length) in enumerate(chunks):
        num_used = -(-(cached + length) // page_size)
        assert num_used <= max_pages
        own_slots = page_table[row, :num_used, None] * page_size + np.arange(page_size)
        slots.append(own_slots.reshape(-1)[: cached + length])
        page_table[row, num_used:] = generator.integers(0, num_pages, max_pages - num_used)

    # The random numbers do not depend on the scale of the garbage.
    keys, values = (_random(generator, shape, num_pages * page_size, shape.num_kv_heads) for _ in range(2))
    scale = np.full(num_pages * page_size, shape.garbage)
    scale[np.concatenate(slots)] = 1.0
    keys, values = (jnp.asarray(x * scale[:, None, None], shape.dtype) for x in (keys, values))
    (pages,) = kv_cache.create(_model(shape), num_pages, page_size, shape.dtype).layers
    pages = kv_cache.write(pages, keys, values, _int32(np.arange(num_pages * page_size)))

    num_tokens = sum(length for _, length in chunks) + num_padding
    queries = 2 * _random(generator, shape, num_tokens, shape.num_heads)  # some keys matter much more than others
    wide_keys, wide_values = np.asarray(keys, np.float64), np.asarray(values, np.float64)
    return Case(
        shape=shape,
        chunks=chunks,
        queries=jnp.asarray(queries, shape.dtype),
        pages=pages,
        page_table=_int32(page_table),
        slots=slots,
        sequences=[(wide_keys[own], wide_values[own]) for own in slots],
    )


def dense_attention(case: Case, window: int | None) -> np.ndarray:
    """The definition in float64, query by query over its own sequence -> [T without padding, N, H]."""
    group = case.shape.num_heads // case.shape.num_kv_heads
    queries = iter(np.asarray(case.queries, np.float64))
    rows = []
    for (cached, length), (keys, values) in zip(case.chunks, case.sequences, strict=True):
        for position in range(cached, cached + length):
            first = 0 if window is None else max(0, position - window + 1)
            query = next(queries)
            heads = []
            for head in range(case.shape.num_heads):
                seen_keys = keys[first : position + 1, head // group]
                scores = seen_keys @ query[head] / np.sqrt(case.shape.head_dim)
                weights = np.exp(scores - scores.max())
                heads.append(weights @ values[first : position + 1, head // group] / weights.sum())
            rows.append(np.stack(heads))
    return np.stack(rows)


def _model(shape: Shape) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=8,
        hidden_size=8,
        num_layers=1,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        ffn_size=8,
        max_position=4096,
    )


def _random(generator: np.random.Generator, shape: Shape, num_tokens: int, num_heads: int) -> np.ndarray:
    return generator.standard_normal((num_tokens, num_heads, shape.head_dim))
