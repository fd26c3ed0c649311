"""Paged decode attention beside the read rate measured in the same run, and beside a float32 reference; JSON lines.

python scripts/bench_paged_decode.py                       # the shapes of the goals
python scripts/bench_paged_decode.py --cases all           # every head dim, page size and ratio, windows and soft caps
python scripts/bench_paged_decode.py --smoke               # tiny and interpreted, on a CPU

A time is that of one call among many in one compiled program, as in a model's step; the calls read different pages,
together more than the L2 cache holds. `share` is of the read rate, `kernel_microseconds` the time inside kernels alone,
from a trace: where it is much less, launching them is the limit. `error` is ||out - reference|| / ||reference|| over
the first and the last sequences.
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from miniinfer_jax.benchmark.ceilings import measure_read_rate
from miniinfer_jax.benchmark.kernel_trace import read_events, recorded
from miniinfer_jax.pallas_kernels.paged_decode import choose_num_splits, paged_decode_attention

NUM_CHECKED = 4  # sequences
CACHE_BYTES = 2**28  # of several calls together: five times the L2 cache
MAX_SETS = 64


@dataclass(frozen=True)
class Case:
    """One shape: `length` tokens in each of `batch` contexts, or from 1 up to that with `is_ragged`."""

    name: str
    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 64
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    num_splits: int | None = None
    is_ragged: bool = False

    @property
    def pages_a_sequence(self) -> int:
        return -(-self.length // self.page_size)

    @property
    def lengths(self) -> np.ndarray:
        if self.is_ragged:
            return np.linspace(1, self.length, self.batch).astype(np.int32)
        return np.full(self.batch, self.length, np.int32)

    @property
    def num_bytes(self) -> int:
        """Keys and values that one call has to read."""
        tokens = self.lengths if self.window is None else np.minimum(self.lengths, self.window)
        return int(tokens.sum()) * self.num_kv_heads * 2 * self.head_dim * jnp.dtype(self.dtype).itemsize


GOALS = [
    Case("256 x 1,024, 16/8, 128", 256, 1024, 16, 8, 128),
    Case("64 x 4,096, 28/4, 128", 64, 4096, 28, 4, 128),
    Case("128 x 2,048, 14/2, 64", 128, 2048, 14, 2, 64),
    Case("1 x 131,072, 28/4, 128", 1, 131072, 28, 4, 128),
    Case("1 x 1,024, 28/4, 128", 1, 1024, 28, 4, 128),
    Case("1 x 1,024, 14/2, 64", 1, 1024, 14, 2, 64),
    Case("8 x 1,024, 16/8, 128", 8, 1024, 16, 8, 128),
]
OTHERS = [
    Case("64 x 4,096, page 16", 64, 4096, 28, 4, 128, page_size=16),
    Case("64 x 4,096, page 32", 64, 4096, 28, 4, 128, page_size=32),
    Case("64 x 4,096, page 128", 64, 4096, 28, 4, 128, page_size=128),
    Case("128 x 2,048, 14/2, 64, page 16", 128, 2048, 14, 2, 64, page_size=16),
    Case("64 x 2,048, 32/32, 80", 64, 2048, 32, 32, 80),
    Case("64 x 2,048, 32/8, 96", 64, 2048, 32, 8, 96),
    Case("64 x 2,048, 8/4, 256", 64, 2048, 8, 4, 256),
    Case("64 x 4,096, 32/4, 128, float16", 64, 4096, 32, 4, 128, dtype="float16"),
    Case("64 x 8,192, window 4,096", 64, 8192, 16, 8, 128, window=4096),
    Case("64 x 4,096, soft cap 50", 64, 4096, 16, 8, 128, soft_cap=50.0),
    Case("64 x 1 to 8,192", 64, 8192, 16, 8, 128, is_ragged=True),
    Case("4 x 1 to 131,072, page 16", 4, 131072, 28, 4, 128, page_size=16, is_ragged=True),
]


@dataclass(frozen=True)
class Inputs:
    """Queries, one pool, and page tables that share no page."""

    queries: jax.Array
    pages: jax.Array
    page_tables: list[jax.Array]
    context_lens: jax.Array


def make_inputs(case: Case) -> Inputs:
    """Random contents in permuted pages, as many tables as it takes to overflow the L2 cache."""
    num_sets = min(MAX_SETS, max(2, -(-CACHE_BYTES // case.num_bytes)))
    pages_a_set = case.batch * case.pages_a_sequence
    tables = np.random.default_rng(0).permutation(num_sets * pages_a_set).astype(np.int32)
    shape = (num_sets * pages_a_set, case.page_size, case.num_kv_heads, 2, case.head_dim)
    return Inputs(
        jax.random.normal(jax.random.key(0), (case.batch, case.num_heads, case.head_dim), jnp.dtype(case.dtype)),
        draw_pages(shape, case.dtype),
        [jnp.asarray(one) for one in tables.reshape(num_sets, case.batch, case.pages_a_sequence)],
        jnp.asarray(case.lengths),
    )


@partial(jax.jit, static_argnums=(0, 1))
def draw_pages(shape: tuple[int, ...], dtype: str) -> jax.Array:
    bits = jax.random.bits(jax.random.key(1, impl="rbg"), shape, jnp.uint8)  # quick to draw gigabytes from
    return (bits.astype(jnp.float32) / 64 - 2).astype(dtype)


@partial(jax.jit, static_argnums=0)
def attend_plainly(case: Case, query: jax.Array, pages: jax.Array, table: jax.Array, length: jax.Array) -> jax.Array:
    """One sequence's query [N, H] over its pages, in float32."""
    context = pages[table].reshape(-1, case.num_kv_heads, 2, case.head_dim).astype(jnp.float32)
    grouped = query.reshape(case.num_kv_heads, -1, case.head_dim).astype(jnp.float32)
    scores = jnp.einsum("kgh,skh->kgs", grouped, context[:, :, 0], precision="highest") / case.head_dim**0.5
    if case.soft_cap is not None:
        scores = case.soft_cap * jnp.tanh(scores / case.soft_cap)
    positions = jnp.arange(context.shape[0])
    first = 0 if case.window is None else length - case.window
    weights = jax.nn.softmax(jnp.where((positions < length) & (positions >= first), scores, -jnp.inf))
    return jnp.einsum("kgs,skh->kgh", weights, context[:, :, 1], precision="highest").reshape(query.shape)


def relative_error(case: Case, inputs: Inputs, attended: jax.Array) -> float:
    """Over the first and the last sequences."""
    rows = sorted({*range(min(NUM_CHECKED, case.batch)), case.batch - 1})
    table, lens = inputs.page_tables[0], inputs.context_lens
    expected = [attend_plainly(case, inputs.queries[row], inputs.pages, table[row], lens[row]) for row in rows]
    difference = np.stack(expected) - np.asarray(attended, np.float32)[rows]
    return float(np.linalg.norm(difference) / np.linalg.norm(np.stack(expected)))


def measure(case: Case, num_calls: int, num_repeats: int, interpret: bool) -> dict[str, Any]:
    """Compiles, checks and times one case."""
    inputs = make_inputs(case)
    call = partial(
        paged_decode_attention,
        window=case.window,
        soft_cap=case.soft_cap,
        num_splits=case.num_splits,
        interpret=interpret,
    )

    def chain(queries: jax.Array, pages: jax.Array, tables: list[jax.Array], lens: jax.Array) -> jax.Array:
        for index in range(num_calls):  # the result of one is the query of the next: none can be left out or moved
            queries = call(queries, pages, tables[index % len(tables)], lens)
        return queries

    arguments = (inputs.queries, inputs.pages, inputs.page_tables, inputs.context_lens)
    started_at = time.perf_counter()
    compiled = jax.jit(chain).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - started_at
    attended = call(inputs.queries, inputs.pages, inputs.page_tables[0], inputs.context_lens)
    row = {**asdict(case), "num_splits": case.num_splits or splits_of(case)}
    row |= {"error": relative_error(case, inputs, attended), "compile_seconds": compile_seconds}
    if not interpret:
        row["microseconds"] = 1e6 * median_seconds(partial(compiled, *arguments), num_repeats) / num_calls
        row["kernel_microseconds"] = kernel_microseconds(partial(compiled, *arguments)) / num_calls
    return row


def splits_of(case: Case) -> int:
    return choose_num_splits(case.batch, case.num_kv_heads, case.pages_a_sequence * case.page_size)


def median_seconds(compute: Any, num_repeats: int) -> float:
    """Of one call among several that are queued, after the calls in which a CUDA graph is recorded."""
    num_queued = 4
    for _ in range(3):
        compute().block_until_ready()
    times = []
    for _ in range(num_repeats):
        started_at = time.perf_counter()
        jax.block_until_ready([compute() for _ in range(num_queued)])
        times.append((time.perf_counter() - started_at) / num_queued)
    return statistics.median(times)


def kernel_microseconds(compute: Any) -> float:
    """What one call spends inside kernels."""
    with tempfile.TemporaryDirectory() as folder:
        with recorded(Path(folder)):
            compute().block_until_ready()
        return sum(event.end_ns - event.start_ns for event in read_events(Path(folder))) / 1e3


def tiny(case: Case) -> Case:
    window = case.window and 40
    return replace(case, batch=min(case.batch, 2), length=160, window=window)


def main(
    cases: Annotated[str, typer.Option(help="goals, all, or words that a case's name contains.")] = "goals",
    num_splits: Annotated[str, typer.Option(help="Comma-separated, tried one after the other; empty: the rule.")] = "",
    num_calls: Annotated[int, typer.Option(help="Calls in one compiled program.")] = 24,
    num_repeats: Annotated[int, typer.Option(help="Timings; the median counts.")] = 7,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny shapes, interpreted on the CPU, not timed.")] = False,
) -> None:
    """Prints a line for each case."""
    known = [*GOALS, *OTHERS]
    chosen = {"goals": GOALS, "all": known}.get(cases) or [case for case in known if cases in case.name]
    if not chosen:
        raise typer.BadParameter(f"no case's name contains {cases!r}")
    if num_splits:
        chosen = [replace(case, num_splits=int(number)) for case in chosen for number in num_splits.split(",")]
    device = jax.devices()[0].device_kind
    if smoke:
        for case in map(tiny, chosen):
            print(json.dumps({"device": device, **measure(case, 2, 1, interpret=True)}), flush=True)
        return
    read_rate = measure_read_rate(2**32)
    for case in chosen:
        row = measure(case, num_calls, num_repeats, interpret=False)
        rate = 1e6 * case.num_bytes / row["microseconds"]
        row |= {"gigabytes": case.num_bytes / 1e9, "share": rate / read_rate, "read_rate": read_rate}
        print(json.dumps({"device": device, "jax": jax.__version__, **row}), flush=True)


if __name__ == "__main__":
    typer.run(main)
