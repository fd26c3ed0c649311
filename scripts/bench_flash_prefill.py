"""Flash attention of prompts over pages: time, rate and error of each shape, beside cuDNN; a JSON line each.

python scripts/bench_flash_prefill.py                        # on a Hopper GPU
python scripts/bench_flash_prefill.py --tiling 2,128,2,1,0   # another tiling as well: the fields of `Tiling`
python scripts/bench_flash_prefill.py --smoke                # tiny, interpreted, on a CPU

A call is timed as one of several with other queries in one jitted function, as the layers of a model make them; the
list of tiles is then made once. Rates count the products of visible keys alone. The error is |out - ref| / |ref|
against float32 attention over the chunks' own keys; slots that no chunk owns hold NaN.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miniinfer_jax.pallas_kernels import flash_prefill
from miniinfer_jax.pallas_kernels.prefill_tiles import Tiling


class Case(NamedTuple):
    name: str
    chunks: list[tuple[int, int]]  # (tokens in the cache before, tokens of the chunk)
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    num_padding: int = 0


def whole(batch_size: int, length: int) -> list[tuple[int, int]]:
    return [(0, length)] * batch_size


MIXED = [(1000 + 13 * row, 1) for row in range(60)] + [(0, 0), (500, 700), (0, 1111), (3000, 7), (0, 100), (2048, 2048)]
RAGGED = [(5, 1), (0, 0), (0, 300), (1000, 137), (0, 1), (77, 64), (300, 1)]
SMALL: dict[str, Any] = {"num_heads": 14, "num_kv_heads": 2, "head_dim": 64}

MAIN_CASES = [
    Case("1 x 2048", whole(1, 2048)),
    Case("4 x 4096", whole(4, 4096)),
    Case("1 x 8192", whole(1, 8192)),
    Case("1 x 2048, d 64", whole(1, 2048), **SMALL),
    Case("4 x 4096, d 64", whole(4, 4096), **SMALL),
    Case("1 x 8192, d 64", whole(1, 8192), **SMALL),
    Case("8 x 1024, d 64", whole(8, 1024), **SMALL),
    Case("2048 on 30k", [(30720, 2048)]),
    Case("2048 on 30k, d 64", [(30720, 2048)], **SMALL),
]
MORE_CASES = [
    Case("60 decoding, 5 chunks", MIXED, num_padding=90),
    Case("256 decoding x 1024", [(1023, 1)] * 256),
    Case("1 x 8192, window 1024", whole(1, 8192), window=1024),
    Case("4 x 4096, soft cap", whole(4, 4096), soft_cap=30.0),
    Case("4 x 4096, f16", whole(4, 4096), dtype="float16"),
    *(Case(f"4 x 4096, page {size}", whole(4, 4096), page_size=size) for size in (32, 64, 128)),
    *(Case(f"4 x 4096, {n}/{k} heads", whole(4, 4096), n, k) for n, k in ((16, 16), (16, 8), (32, 8), (32, 4))),
    *(Case(f"4 x 4096, d {dim}", whole(4, 4096), 16, 8, dim, 64) for dim in (80, 96, 256)),
    *(
        Case(f"ragged, {n}/{k} heads, d {dim}, page {size}, {dtype}", RAGGED, n, k, dim, size, dtype, 200, 20.0, 40)
        for n, k, dim, size, dtype in (
            (4, 4, 64, 128, "float16"),
            (8, 4, 80, 16, "bfloat16"),
            (8, 2, 96, 32, "float16"),
            (14, 2, 128, 64, "bfloat16"),
            (8, 1, 256, 128, "bfloat16"),
        )
    ),
]
TUNED_CASES = [case for case in MAIN_CASES if case.name.startswith("4 x 4096")]
SMOKE_CASES = [Case("smoke", [(20, 1), (0, 0), (5, 30)], 4, 2, 64, 16, window=24, num_padding=2)]


def abstract_arrays(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Queries, pages, page table, query starts and context lengths."""
    used = [-(-(cached + length) // case.page_size) for cached, length in case.chunks]
    num_tokens = sum(length for _, length in case.chunks) + case.num_padding
    return (
        jax.ShapeDtypeStruct((num_tokens, case.num_heads, case.head_dim), case.dtype),
        jax.ShapeDtypeStruct((sum(used) + 1, case.page_size, case.num_kv_heads, 2, case.head_dim), case.dtype),
        jax.ShapeDtypeStruct((len(used), max(used) + 1), jnp.int32),
        jax.ShapeDtypeStruct((len(used) + 1,), jnp.int32),
        jax.ShapeDtypeStruct((len(used),), jnp.int32),
    )


def random_array(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    """Normal numbers, of which 4 million differ: drawing all would take longer than what is measured."""
    return np.resize(np.roll(random_numbers(str(jnp.dtype(dtype))), 100_003 * seed), shape)


@cache
def random_numbers(dtype: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(2**22, np.float32).astype(dtype)


def make_arrays(case: Case) -> tuple[np.ndarray, ...]:
    """What `abstract_arrays` says; pages in any order, NaN in the slots that no chunk owns."""
    queries, pages, page_table, _, _ = abstract_arrays(case)
    generator = np.random.default_rng(0)
    contexts = np.array([cached + length for cached, length in case.chunks])
    table = np.full(page_table.shape, pages.shape[0] - 1)
    owned = np.zeros(pages.shape[:2], bool)
    page_ids = iter(generator.permutation(pages.shape[0] - 1))
    for row, context in enumerate(contexts):
        for index in range(-(-context // case.page_size)):
            table[row, index] = next(page_ids)
            owned[table[row, index], : context - index * case.page_size] = True
    values = random_array(pages.shape, pages.dtype, 1)
    values[~owned] = np.nan
    starts = np.cumsum([0, *(length for _, length in case.chunks)])
    indices = (np.asarray(array, np.int32) for array in (table, starts, contexts))
    return random_array(queries.shape, queries.dtype, 2), values, *indices


def attend_one_head(case: Case, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Queries [L, H] at the end of the sequence of keys [C, H]."""
    scores = queries @ keys.T / np.float32(case.head_dim**0.5)
    if case.soft_cap is not None:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    distance = np.arange(len(keys) - len(queries), len(keys))[:, None] - np.arange(len(keys))
    scores[(distance < 0) | (distance >= (case.window or 2**30))] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights @ values / weights.sum(axis=1, keepdims=True)


def measure_error(case: Case, arrays: tuple[np.ndarray, ...], out: np.ndarray) -> float:
    """Relative error over two heads of one chunk of each shape; NaN or more where the output or its padding is bad."""
    queries, pages, page_table, starts, contexts = arrays
    difference = norm = 0.0
    row_of_shape = {chunk: row for row, chunk in enumerate(case.chunks)}
    for (_, length), row in [item for item in row_of_shape.items() if item[0][1]][-12:]:
        tokens = slice(starts[row], starts[row] + length)
        own = pages[page_table[row]].reshape(-1, *pages.shape[2:])[: contexts[row]]
        for head in (1 % case.num_heads, case.num_heads - 1):
            keys_and_values = own[:, head * case.num_kv_heads // case.num_heads].astype(np.float32)
            query = queries[tokens, head].astype(np.float32)
            expected = attend_one_head(case, query, keys_and_values[:, 0], keys_and_values[:, 1])
            difference += np.sum((out[tokens, head].astype(np.float32) - expected) ** 2)
            norm += np.sum(expected**2)
    padding = np.abs(out[starts[-1] :].astype(np.float32)).sum()
    return float((difference / norm) ** 0.5 + 0 * out.astype(np.float32).sum() + padding)


def count_flops(case: Case) -> float:
    seen = 0
    for cached, length in case.chunks:
        visible = np.arange(cached, cached + length, dtype=np.int64) + 1
        seen += int(np.minimum(visible, case.window or 2**60).sum())
    return 4.0 * seen * case.num_heads * case.head_dim


def time_call(function: Any, args: tuple, num_calls: int) -> float:
    """Median seconds of one of the calls in a compiled function."""
    for _ in range(3 if num_calls > 1 else 0):
        jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(10 if num_calls > 1 else 1):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / num_calls


def several(attend: Any, queries: list[jax.Array], *others: jax.Array) -> list[jax.Array]:
    return [attend(one, *others) for one in queries]


def cudnn_attention(batch_size: int, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    batch = queries.reshape(batch_size, -1, *queries.shape[1:])
    return jax.nn.dot_product_attention(batch, keys, values, is_causal=True, implementation="cudnn")


class Compiled(NamedTuple):
    ours: Any
    cudnn: Any  # None where chunks are not whole and alike
    cudnn_arrays: tuple[jax.ShapeDtypeStruct, ...]  # keys and values
    compile_seconds: float  # beside other compilations


def count_calls(case: Case) -> int:
    """So many that starting them takes no time beside theirs."""
    return min(32, max(4, 2**16 // abstract_arrays(case)[0].shape[0])) if case not in SMOKE_CASES else 1


def usual_tiling(case: Case) -> Tiling:
    return flash_prefill.INTERPRETED if case in SMOKE_CASES else flash_prefill.choose_tiling(case.head_dim)


def compile_calls(case: Case, tiling: Tiling) -> Compiled:
    """Several calls in one function, of this kernel and of cuDNN."""
    num_calls, interpret = count_calls(case), case in SMOKE_CASES
    queries, *others = abstract_arrays(case)

    @jax.jit  # once for all calls
    def attend(*five: jax.Array) -> jax.Array:
        return flash_prefill.attend(tiling, five, case.window, case.soft_cap, interpret)

    start = time.perf_counter()
    ours = jax.jit(partial(several, attend)).lower([queries] * num_calls, *others).compile()
    seconds = time.perf_counter() - start
    is_fresh = len(set(case.chunks)) == 1 and case.chunks[0][0] == 0
    if not is_fresh or case.window or case.soft_cap or case.head_dim > 128 or interpret:
        return Compiled(ours, None, (), seconds)
    shape = (len(case.chunks), case.chunks[0][1], case.num_kv_heads, case.head_dim)
    keys = jax.ShapeDtypeStruct(shape, case.dtype)
    cudnn = jax.jit(partial(several, partial(cudnn_attention, len(case.chunks))))
    return Compiled(ours, cudnn.lower([queries] * num_calls, keys, keys).compile(), (keys, keys), seconds)


def run_case(case: Case, tiling: Tiling, compiled: Compiled) -> dict[str, Any]:
    num_calls = count_calls(case)
    arrays = make_arrays(case)
    shape, dtype = arrays[0].shape, arrays[0].dtype
    queries = [arrays[0], *(random_array(shape, dtype, 3 + index) for index in range(num_calls - 1))]
    args = jax.device_put((queries, *arrays[1:]))
    error = measure_error(case, arrays, np.asarray(compiled.ours(*args)[0]))
    seconds = time_call(compiled.ours, args, num_calls)
    flops = count_flops(case)
    row = {
        "case": case.name,
        "tiling": [int(field) for field in tiling],
        "error": round(error, 5),
        "ms": round(seconds * 1e3, 4),
        "tflops": round(flops / seconds / 1e12, 1),
        "compile_seconds": round(compiled.compile_seconds, 2),
    }
    if compiled.cudnn is not None:
        keys_and_values = [
            random_array(one.shape, one.dtype, 1 + side) for side, one in enumerate(compiled.cudnn_arrays)
        ]
        cudnn_args = (args[0], *jax.device_put(keys_and_values))
        cudnn_seconds = time_call(compiled.cudnn, cudnn_args, num_calls)
        row |= {"cudnn_ms": round(cudnn_seconds * 1e3, 4), "cudnn_tflops": round(flops / cudnn_seconds / 1e12, 1)}
    return row


def parse_tiling(text: str) -> Tiling:
    consumers, keys, stages, takes_turns, shares_buffer = (int(part) for part in text.split(","))
    return Tiling(consumers, keys, stages, bool(takes_turns), bool(shares_buffer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one tiny case, interpreted")
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--tiling", action="append", type=parse_tiling, default=[], help="tried beside the usual one")
    options = parser.parse_args()
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    for cases in (SMOKE_CASES,) if options.smoke else (MAIN_CASES, TUNED_CASES, MORE_CASES):
        chosen = [case for case in cases if (options.only or "") in case.name]
        if cases is TUNED_CASES:
            run_cases([(case, tiling) for case in chosen for tiling in options.tiling])
        else:
            run_cases([(case, usual_tiling(case)) for case in chosen])


def run_cases(runs: list[tuple[Case, Tiling]]) -> None:
    """Compiles all, then measures one after the other: compiling would disturb."""
    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(compile_calls, *one) for one in runs]
    for (case, tiling), job in zip(runs, jobs, strict=True):
        try:
            row = run_case(case, tiling, job.result())
        except Exception as error:  # a tiling that does not fit must not hide the others
            row = {"case": case.name, "tiling": [int(field) for field in tiling], "failed": str(error)[:300]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
