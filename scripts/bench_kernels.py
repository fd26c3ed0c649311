"""Our attention kernels beside the plain-XLA definition, cuDNN and, where torch is installed, PyTorch; JSON lines.

python scripts/bench_kernels.py                      # on a Hopper GPU
python scripts/bench_kernels.py --only prefill       # the shapes whose name contains it
python scripts/bench_kernels.py --small              # a rehearsal on a CPU: tiny, the kernels interpreted

A time is that of one call among many in one compiled program, as a model's layers make them, on random data: the calls
differ in their queries (prefill) or read other pages, together more than the L2 cache holds (decode). PyTorch's calls
are one CUDA graph. `share` is of the ceilings measured in the same run: of the matrix product's rate (prefill; products
of visible keys alone count) or of the read rate (decode; keys and values count once). `difference` is
||out - definition|| / ||definition||. cuDNN and PyTorch read keys and values that lie densely, not in pages.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import DecodeInputs, PrefillInputs
from miniinfer_jax.benchmark.ceilings import measure_ceilings
from miniinfer_jax.ops.attention import BACKENDS
from miniinfer_jax.pallas_kernels.flash_prefill import flash_prefill_attention
from miniinfer_jax.pallas_kernels.paged_decode import paged_decode_attention

CACHE_BYTES = 2**28  # of several decode calls together: five times the L2 cache
Call = tuple[Any, ...]  # the arguments of one call


@dataclass(frozen=True)
class Shape:
    """`length` new tokens on `cached` ones in each of `batch` sequences (prefill), or `length` cached ones (decode)."""

    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cached: int = 0
    decodes: bool = False
    page_size: int = 16
    dtype: str = "bfloat16"
    max_calls: int = 64

    @property
    def name(self) -> str:
        prefix = f" on {self.cached}" if self.cached else ""
        step = "decode" if self.decodes else "prefill"
        return f"{step} {self.batch} x {self.length}{prefix}, {self.num_heads}/{self.num_kv_heads}, {self.head_dim}"

    @property
    def num_queries(self) -> int:
        """Of each sequence."""
        return 1 if self.decodes else self.length

    @property
    def context_len(self) -> int:
        return self.cached + self.length

    @property
    def pages_each(self) -> int:
        return -(-self.context_len // self.page_size)

    @property
    def num_bytes(self) -> int:
        """Keys and values of all contexts."""
        values = self.batch * self.context_len * self.num_kv_heads * 2 * self.head_dim
        return values * jnp.dtype(self.dtype).itemsize

    @property
    def num_operations(self) -> int:
        """Multiplications and additions of both products, over what each query sees."""
        first = self.context_len - self.num_queries + 1
        num_seen = self.num_queries * (first + self.context_len) // 2
        return 4 * self.batch * num_seen * self.num_heads * self.head_dim

    @property
    def num_sets(self) -> int:
        """Contexts of different calls in different pages."""
        return min(self.max_calls, max(2, -(-CACHE_BYTES // self.num_bytes))) if self.decodes else 1

    @property
    def num_calls(self) -> int:
        """So many that starting them takes no time beside theirs."""
        if self.decodes:
            return min(self.max_calls, max(24, self.num_sets))
        return min(self.max_calls, 32, max(4, 10**12 // self.num_operations))


WIDE, NARROW = (28, 4, 128), (14, 2, 64)  # heads of Qwen2.5 7B and 0.5B
SHAPES = [
    *(
        Shape(batch, length, *heads, cached=cached)
        for heads in (WIDE, NARROW)
        for batch, length, cached in ((1, 2048, 0), (4, 4096, 0), (1, 8192, 0), (1, 2048, 30720))
    ),
    Shape(256, 1024, 16, 8, 128, decodes=True),
    Shape(64, 4096, *WIDE, decodes=True),
    Shape(128, 2048, *NARROW, decodes=True),
    Shape(1, 131072, *WIDE, decodes=True),
    Shape(1, 1024, *WIDE, decodes=True),
]


@partial(jax.jit, static_argnums=0)
def make_arrays(shape: Shape) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """Queries [T, N, H] of each call, a pool, and page tables [B, P] of each set of contexts that share no page."""
    query_shape = (shape.num_calls, shape.batch * shape.num_queries, shape.num_heads, shape.head_dim)
    key = jax.random.key(0, impl="rbg")  # quick to draw gigabytes from
    queries = list(jax.random.normal(key, query_shape, jnp.dtype(shape.dtype)))
    num_pages = shape.num_sets * shape.batch * shape.pages_each
    pool = (num_pages, shape.page_size, shape.num_kv_heads, 2, shape.head_dim)
    bits = jax.random.bits(jax.random.key(1, impl="rbg"), pool, jnp.uint8)
    tables = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    tables = jnp.asarray(tables.reshape(shape.num_sets, shape.batch, shape.pages_each))
    return queries, (bits.astype(jnp.float32) / 64 - 2).astype(shape.dtype), list(tables)


def paged_calls(shape: Shape) -> list[Call]:
    """(queries, pages, page table, query starts, context lengths) of each call."""
    queries, pages, tables = make_arrays(shape)
    starts = jnp.arange(shape.batch + 1, dtype=jnp.int32) * shape.num_queries
    lens = jnp.full(shape.batch, shape.context_len, jnp.int32)
    return [(one, pages, tables[index % shape.num_sets], starts, lens) for index, one in enumerate(queries)]


def dense_calls(shape: Shape) -> list[Call]:
    """(queries [B, L, N, H], keys and values [B, L, K, H]) of each call, the same contents."""
    queries, pages, tables = make_arrays(shape)

    @jax.jit
    def read(pages: jax.Array, table: jax.Array) -> list[jax.Array]:
        return [jnp.swapaxes(part, 1, 2)[:, : shape.context_len] for part in kv_cache.read(pages, table)]

    sets = [read(pages, table) for table in tables]
    query_shape = (shape.batch, shape.num_queries, shape.num_heads, shape.head_dim)
    return [(one.reshape(query_shape), *sets[index % shape.num_sets]) for index, one in enumerate(queries)]


def by_kernel(shape: Shape, interpret: bool, *call: jax.Array) -> jax.Array:
    queries, pages, table, starts, lens = call
    if shape.decodes:
        return paged_decode_attention(queries, pages, table, lens, interpret=interpret)
    return flash_prefill_attention(queries, pages, table, starts, lens, interpret=interpret)


def by_definition(shape: Shape, *call: jax.Array) -> jax.Array:
    queries, pages, table, starts, lens = call
    unused = jnp.zeros(len(queries), jnp.int32)
    if shape.decodes:
        decode_inputs = DecodeInputs(unused, lens - 1, unused, lens, table, stops_early=True)
        return BACKENDS["xla"].decode(queries, pages, decode_inputs, None)
    positions = jnp.tile(jnp.arange(shape.length, dtype=jnp.int32) + shape.cached, shape.batch)
    return BACKENDS["xla"].prefill(
        queries, pages, PrefillInputs(unused, positions, unused, starts, lens, table, stops_early=True), None
    )


def by_cudnn(shape: Shape, *call: jax.Array) -> jax.Array:
    queries, keys, values = call
    is_causal = not shape.decodes
    return jax.nn.dot_product_attention(queries, keys, values, is_causal=is_causal, implementation="cudnn")


def runs_in_cudnn(shape: Shape) -> bool:
    """Its causal mask starts at the first key: wrong for a chunk on a prefix."""
    return shape.decodes or not shape.cached


class Implementation(NamedTuple):
    attend: Callable[..., jax.Array]
    make_calls: Callable[[Shape], list[Call]]
    max_calls: int = 64


def choose_implementations(shape: Shape, interpret: bool) -> dict[str, Implementation]:
    """By name, the definition first."""

    def kernel(shape: Shape, *call: jax.Array) -> jax.Array:
        return by_kernel(shape, interpret, *call)

    # A definition's call takes long enough, and its loops take long to compile.
    chosen = {"xla": Implementation(by_definition, paged_calls, 4), "pallas": Implementation(kernel, paged_calls)}
    if runs_in_cudnn(shape) and not interpret:
        chosen["cudnn"] = Implementation(by_cudnn, dense_calls)
    return chosen


def compile_calls(shape: Shape, implementation: Implementation) -> Any:
    """A program of a shape's calls, or the exception that says why there is none."""
    attend = jax.jit(partial(implementation.attend, shape))  # compiled once for all calls
    try:
        abstract = jax.eval_shape(partial(implementation.make_calls, shape))[: implementation.max_calls]
        return jax.jit(lambda calls: [attend(*call) for call in calls]).lower(abstract).compile()
    except Exception as error:  # one implementation that can't must not hide the others
        return error


def median_seconds(run: Callable[[], Any], finish: Callable[[Any], Any], num_repeats: int) -> tuple[float, Any]:
    """Of one run among others that are queued, after those in which a CUDA graph is recorded; and what one gives."""
    seconds, results = 0.0, []
    for _ in range(3 if num_repeats > 1 else 0):
        started_at = time.perf_counter()
        finish(run())
        seconds = time.perf_counter() - started_at
    num_queued = 1 if num_repeats == 1 else max(1, min(8, int(0.02 / seconds)))
    times = []
    for _ in range(num_repeats):
        started_at = time.perf_counter()
        results = [run() for _ in range(num_queued)]
        finish(results)
        times.append((time.perf_counter() - started_at) / num_queued)
    return statistics.median(times), results[-1]


def measure(program: Any, calls: list[Call], num_repeats: int) -> tuple[float, np.ndarray]:
    """Seconds of a call, and what the first one gives."""
    seconds, results = median_seconds(partial(program, calls), jax.block_until_ready, num_repeats)
    return seconds / len(calls), np.asarray(results[0], np.float32)


def measure_torch(shape: Shape, dense: list[Call], num_repeats: int) -> tuple[float, np.ndarray]:
    """As `measure`, by PyTorch's scaled_dot_product_attention."""
    import torch

    calls = [[torch.from_dlpack(array).transpose(1, 2) for array in call] for call in dense]
    attend: Any = torch.nn.functional.scaled_dot_product_attention

    def run() -> list[Any]:
        return [attend(*call, is_causal=not shape.decodes, enable_gqa=True) for call in calls]

    with torch.inference_mode():
        results = run()
        if torch.cuda.is_available():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = run()
            seconds, _ = median_seconds(graph.replay, lambda _: torch.cuda.synchronize(), num_repeats)
        else:
            seconds, results = median_seconds(run, lambda _: None, num_repeats)
        return seconds / len(calls), results[0].transpose(1, 2).float().cpu().numpy()


def rows(shape: Shape, jobs: dict[str, Any], interpret: bool, num_repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each implementation, without the shares."""
    made: dict[Any, list[Call]] = {paged_calls: paged_calls(shape)}
    if runs_in_cudnn(shape):
        made[dense_calls] = dense_calls(shape)

    def run(name: str) -> tuple[float, np.ndarray]:
        if name == "torch":
            return measure_torch(shape, made[dense_calls], num_repeats)
        program, (_, make_calls, max_calls) = jobs[name].result(), choose_implementations(shape, interpret)[name]
        if isinstance(program, Exception):
            raise program
        return measure(program, made[make_calls][:max_calls], num_repeats)

    expected = None
    for name in [*jobs, *(["torch"] if find_spec("torch") and runs_in_cudnn(shape) else [])]:
        row: dict[str, Any] = {"shape": shape.name, "implementation": name}
        try:
            seconds, first = run(name)
        except Exception as error:  # as above
            yield row | {"failed": str(error)[:200]}
            continue
        first = first.reshape(-1, shape.num_heads, shape.head_dim)
        expected = first if name == "xla" else expected
        row["milliseconds"] = seconds * 1e3
        if shape.decodes:
            row["gigabytes_per_second"] = shape.num_bytes / seconds / 1e9
        else:
            row["teraflops"] = shape.num_operations / seconds / 1e12
        if expected is not None:
            row["difference"] = float(np.linalg.norm(first - expected) / np.linalg.norm(expected))
        yield row


def tiny(shape: Shape) -> Shape:
    """A shape of the same kind for a CPU, where a call of an interpreted kernel takes seconds."""
    return Shape(1, 24, 2, 1, 64, cached=shape.cached and 40, decodes=shape.decodes, max_calls=1)


def main(
    only: Annotated[str, typer.Option(help="Words that a shape's name contains.")] = "",
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 16,
    num_repeats: Annotated[int, typer.Option(help="Timings; the median counts.")] = 7,
    small: Annotated[bool, typer.Option("--small", help="A rehearsal on a CPU.")] = False,
) -> None:
    """Prints the device and its ceilings, then a line for each shape and implementation."""
    chosen = [replace(shape, page_size=page_size) for shape in SHAPES if only in shape.name]
    if not chosen:
        raise typer.BadParameter(f"no shape's name contains {only!r}; there are: {'; '.join(s.name for s in SHAPES)}")
    if small:
        chosen, num_repeats = list(dict.fromkeys(map(tiny, chosen))), 1
    ceilings = measure_ceilings("float32" if small else "bfloat16")
    header = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "page_size": page_size}
    rates = {
        "matmul_teraflops": ceilings.operations_per_second / 1e12,
        "read_gigabytes": ceilings.bytes_per_second / 1e9,
    }
    print(json.dumps({**header, **rates}), flush=True)
    with ThreadPoolExecutor(1 if small else 16) as pool:  # all, before anything is timed
        jobs = [
            {name: pool.submit(compile_calls, shape, one) for name, one in choose_implementations(shape, small).items()}
            for shape in chosen
        ]
    for shape, shape_jobs in zip(chosen, jobs, strict=True):
        for row in rows(shape, shape_jobs, small, num_repeats):
            for rate, ceiling in (("teraflops", "matmul_teraflops"), ("gigabytes_per_second", "read_gigabytes")):
                if rate in row:
                    row["share"] = row[rate] / rates[ceiling]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(main)
