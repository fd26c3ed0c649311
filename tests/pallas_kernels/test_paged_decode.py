"""Paged decode attention against its definition, written here in numpy; one suite for every implementation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.pallas_kernels.paged_decode import (
    choose_num_splits,
    paged_decode_attention,
    unsupported,
)

TOLERANCES = {"bfloat16": 6e-3, "float16": 1e-3}  # of ||out - expected|| / ||expected||: results and weights rounded


@dataclass(frozen=True)
class Case:
    """Contexts of these lengths in permuted pages; everything that no query sees is NaN."""

    lengths: tuple[int, ...] = (65, 0, 1, 130)
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    page_size: int = 16
    spare_columns: int = 1  # of the page table: with ids of other sequences' pages
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    num_splits: int = 1


TINY = Case()
# Interpreting a block of keys takes milliseconds: few blocks, each case for a reason.
CASES = {
    "ragged": TINY,
    "ratio 1, page 32": replace(TINY, group=1, page_size=32, lengths=(33, 64)),
    "ratio 4, page 128": replace(TINY, group=4, page_size=128, lengths=(200, 7)),
    "ratio 7, page 64": replace(TINY, group=7, page_size=64, lengths=(129, 64)),
    "ratio 8, one kv head": replace(TINY, group=8, num_kv_heads=1, lengths=(100, 3)),
    "ratio 12": replace(TINY, group=12, num_kv_heads=1, lengths=(70,)),
    "head 80, float16": replace(TINY, head_dim=80, dtype="float16", lengths=(70, 30)),
    "head 96": replace(TINY, head_dim=96, lengths=(70, 30)),
    "head 128": replace(TINY, head_dim=128, lengths=(70, 30)),
    "head 256": replace(TINY, head_dim=256, lengths=(70,)),
    "ring wraps": replace(TINY, lengths=(64 * 9 + 5,), num_kv_heads=1, page_size=64),
    "no spare column": replace(TINY, lengths=(80, 16), spare_columns=0),
    "window inside a block": replace(TINY, window=20),
    "window of whole blocks": replace(TINY, window=64, lengths=(192, 200, 30)),
    "window of one": replace(TINY, window=1),
    "window and page 128": replace(TINY, window=70, page_size=128, lengths=(260, 300)),
    "soft cap": replace(TINY, soft_cap=2.0),
    "splits": replace(TINY, num_splits=2, lengths=(200, 0, 3)),
    "splits, head 80, ratio 7": replace(TINY, num_splits=3, head_dim=80, group=7, num_kv_heads=1, lengths=(200, 64)),
    "splits, window, soft cap": replace(TINY, num_splits=5, window=100, soft_cap=5.0, lengths=(260, 90)),
    "splits, head 256": replace(TINY, num_splits=2, head_dim=256, num_kv_heads=1, lengths=(100,)),
}
LARGE = {
    f"head {head_dim}, page {page_size}, ratio {group}, {dtype}": Case(
        lengths=(1, 4097, 0, 63, 64, 1000, 65, 2048),
        num_kv_heads=4,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        window=window,
        soft_cap=soft_cap,
        num_splits=num_splits,
    )
    for (head_dim, page_size, group, dtype, window, soft_cap, num_splits) in [
        (64, 16, 7, "bfloat16", None, None, 1),
        (64, 128, 1, "float16", 1000, None, 9),
        (80, 32, 2, "bfloat16", None, 20.0, 1),
        (96, 64, 8, "float16", 100, 5.0, 4),
        (128, 16, 7, "bfloat16", None, None, 1),
        (128, 64, 8, "bfloat16", 500, None, 16),
        (128, 128, 4, "float16", None, 30.0, 1),
        (256, 16, 4, "bfloat16", None, None, 1),
        (256, 128, 2, "float16", 65, None, 3),
    ]
}


@dataclass(frozen=True)
class Inputs:
    queries: jax.Array
    pages: jax.Array
    page_table: jax.Array
    context_lens: jax.Array
    expected: np.ndarray


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = np.random.default_rng(seed)
    page_size, num_rows = case.page_size, len(case.lengths)
    columns = -(-max(case.lengths) // page_size) + case.spare_columns
    num_pages = num_rows * columns + 2
    page_table = generator.permutation(num_pages)[: num_rows * columns].reshape(num_rows, columns)
    shape = (num_pages, page_size, case.num_kv_heads, 2, case.head_dim)
    pages = np.asarray(jnp.asarray(generator.standard_normal(shape), case.dtype), np.float32)
    num_heads = case.num_kv_heads * case.group
    queries = jnp.asarray(2 * generator.standard_normal((num_rows, num_heads, case.head_dim)), case.dtype)

    expected = np.zeros(queries.shape)
    is_seen = np.zeros((num_pages, page_size), bool)
    for row, length in enumerate(case.lengths):
        positions = np.arange(0 if case.window is None else max(0, length - case.window), length)
        own = page_table[row, positions // page_size], positions % page_size
        is_seen[own] = True
        page_table[row, -(-length // page_size) :] = generator.integers(
            0, num_pages, columns + -length // page_size if length else columns
        )
        if length:
            expected[row] = dense_attention(case, np.asarray(queries[row], np.float64), pages[own].astype(np.float64))
    pages[~is_seen] = np.nan
    return Inputs(
        queries,
        jnp.asarray(pages, case.dtype),
        jnp.asarray(page_table, jnp.int32),
        jnp.asarray(case.lengths, jnp.int32),
        expected,
    )


def dense_attention(case: Case, query: np.ndarray, context: np.ndarray) -> np.ndarray:
    """The definition, in float64: query [N, H] over context [tokens, K, 2, H] -> [N, H]."""
    heads = []
    for head in range(len(query)):
        keys, values = context[:, head // case.group, 0], context[:, head // case.group, 1]
        scores = keys @ query[head] / np.sqrt(case.head_dim)
        if case.soft_cap is not None:
            scores = case.soft_cap * np.tanh(scores / case.soft_cap)
        weights = np.exp(scores - scores.max())
        heads.append(weights @ values / weights.sum())
    return np.stack(heads)


def attend_plainly(
    queries: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    *,
    window: int | None,
    soft_cap: float | None,
    num_splits: int,
) -> jax.Array:
    """Plain XLA: gathers every page of the table."""
    del num_splits
    num_rows, _, head_dim = queries.shape
    num_kv_heads = pages.shape[2]
    context = pages[page_table].reshape(num_rows, -1, num_kv_heads, 2, head_dim).astype(jnp.float32)
    positions = jnp.arange(context.shape[1])
    is_seen = positions < context_lens[:, None]
    if window is not None:
        is_seen &= positions >= context_lens[:, None] - window
    context = jnp.where(is_seen[:, :, None, None, None], context, 0)
    grouped = queries.reshape(num_rows, num_kv_heads, -1, head_dim).astype(jnp.float32)
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, context[:, :, :, 0], precision="highest") / head_dim**0.5
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(is_seen[:, None, None], scores, -1e30)
    weights = jnp.where(is_seen[:, None, None], jax.nn.softmax(scores), 0)
    attended = jnp.einsum("bkgs,bskh->bkgh", weights, context[:, :, :, 1], precision="highest")
    return attended.reshape(queries.shape).astype(queries.dtype)


IMPLEMENTATIONS: list[Any] = [
    pytest.param(attend_plainly, id="plain"),
    pytest.param(partial(paged_decode_attention, interpret=True), id="interpreted"),
    pytest.param(paged_decode_attention, id="compiled", marks=pytest.mark.gpu),
]


def relative_error(attend: Callable[..., jax.Array], case: Case) -> float:
    inputs = make_inputs(case)
    options = {"window": case.window, "soft_cap": case.soft_cap, "num_splits": case.num_splits}
    attended = attend(inputs.queries, inputs.pages, inputs.page_table, inputs.context_lens, **options)
    assert attended.shape == inputs.queries.shape and attended.dtype == inputs.queries.dtype
    attended = np.asarray(attended, np.float64)
    for row, length in enumerate(case.lengths):
        assert length or not attended[row].any(), "a row without context is not zero"
    return float(np.linalg.norm(attended - inputs.expected) / np.linalg.norm(inputs.expected))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_matches_the_definition(attend, name):
    assert relative_error(attend, CASES[name]) < TOLERANCES[CASES[name].dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_matches_the_definition_at_size(name):
    assert relative_error(paged_decode_attention, LARGE[name]) < TOLERANCES[LARGE[name].dtype]


@pytest.mark.gpu
def test_a_context_of_128k_beside_one_of_1():
    case = Case(lengths=(131072, 1), num_kv_heads=1, group=7, head_dim=128, num_splits=64)
    assert relative_error(paged_decode_attention, case) < TOLERANCES[case.dtype]


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("attend", IMPLEMENTATIONS[1:])
def test_neighbours_do_not_change_a_bit(attend, num_splits):
    inputs = make_inputs(replace(TINY, lengths=(150, 20)))
    together = attend(inputs.queries, inputs.pages, inputs.page_table, inputs.context_lens, num_splits=num_splits)
    alone = attend(
        inputs.queries[:1], inputs.pages, inputs.page_table[:1], inputs.context_lens[:1], num_splits=num_splits
    )
    assert np.array_equal(np.asarray(together[:1], np.float32), np.asarray(alone, np.float32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 72}, "head_dim 72: takes 64, 80, 96, 128, 256"),
        ({"page_size": 8}, "page_size 8: takes 16, 32, 64, 128"),
        ({"dtype": "float32"}, "dtype float32: takes bfloat16 or float16"),
        ({"num_heads": 10}, "10 query heads on 4 kv heads: takes 1 to 64"),
        ({}, None),
    ],
)
def test_says_what_it_cannot_run(change, words):
    shapes = {"head_dim": 128, "page_size": 16, "num_heads": 8, "num_kv_heads": 4, "dtype": "bfloat16"}
    reason = unsupported(**{**shapes, **change})
    assert reason is None if words is None else words in (reason or "")


def test_refuses_what_it_cannot_run():
    inputs = make_inputs(replace(TINY, page_size=8))
    with pytest.raises(ValueError, match="page_size 8"):
        paged_decode_attention(inputs.queries, inputs.pages, inputs.page_table, inputs.context_lens, interpret=True)


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "max_len", "expected"),
    [(256, 8, 1024, 1), (64, 4, 4096, 1), (128, 2, 2048, 1), (1, 4, 1024, 16), (1, 8, 64, 1), (1, 4, 131072, 64)],
)
def test_splits_fill_the_device(batch, num_kv_heads, max_len, expected):
    assert choose_num_splits(batch, num_kv_heads, max_len, num_sms=132) == expected


def test_layers_share_one_trace():
    inputs = make_inputs(TINY)

    def three_layers(queries: jax.Array) -> jax.Array:
        for _ in range(3):
            queries = paged_decode_attention(
                queries, inputs.pages, inputs.page_table, inputs.context_lens, num_splits=1, interpret=True
            )
        return queries

    calls = [equation for equation in jax.make_jaxpr(three_layers)(inputs.queries).eqns if "jaxpr" in equation.params]
    assert len({id(equation.params["jaxpr"]) for equation in calls}) == 1 and len(calls) == 3
