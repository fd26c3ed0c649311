"""Products of few rows: microseconds and share of the read bandwidth, beside the plain operations; a JSON line each.

python scripts/bench_skinny_linear.py                   # on a Hopper GPU
python scripts/bench_skinny_linear.py --only 0.5b --rows 1 --rows 8
python scripts/bench_skinny_linear.py --smoke           # tiny, interpreted, on a CPU

Timed are chains in one jitted function, each product after the one before, with weights of their own as in a model: a
feed-forward network (two kernels: norm, gate and up, silu; down, residual), attention's two products (norm, qkv;
output, residual; its first columns stand for what is attended), and the logits. The error is |out - ref| / |ref| of
one link against float32.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from miniinfer_jax.ops.linear import linear
from miniinfer_jax.ops.norms import rms_norm
from miniinfer_jax.pallas_kernels.skinny_linear import skinny_gated_linear, skinny_linear

EPSILON = 1e-6
CHAIN_BYTES = 400e6  # of weights, several times what a GPU's cache holds


class Sizes(NamedTuple):
    hidden: int
    qkv: int
    attended: int
    ffn: int
    vocab: int


MODELS = {
    "qwen2.5-0.5b": Sizes(896, 1152, 896, 4864, 151_936),
    "qwen3-0.6b": Sizes(1024, 4096, 2048, 3072, 151_936),
    "qwen2.5-1.5b": Sizes(1536, 2048, 1536, 8960, 151_936),
    "qwen2.5-7b": Sizes(3584, 4608, 3584, 18944, 152_064),
    "qwen3-8b": Sizes(4096, 6144, 4096, 12288, 151_936),
}
SMOKE_MODELS = {"smoke": Sizes(128, 192, 128, 128, 192)}
Link = Callable[[jax.Array, jax.Array, list[jax.Array]], jax.Array]  # (hidden [T, D], norm weight [D], weights)


def feed_forward(interpret: bool, hidden: jax.Array, norm: jax.Array, weights: list[jax.Array]) -> jax.Array:
    activated = skinny_gated_linear(hidden, weights[0], norm=(norm, EPSILON), interpret=interpret)
    return skinny_linear(activated, weights[1], residual=hidden, interpret=interpret)


def plain_feed_forward(hidden: jax.Array, norm: jax.Array, weights: list[jax.Array]) -> jax.Array:
    gate_up = linear(rms_norm(hidden, norm, EPSILON), weights[0])
    return hidden + linear(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1], weights[1])


def attention(interpret: bool, hidden: jax.Array, norm: jax.Array, weights: list[jax.Array]) -> jax.Array:
    qkv = skinny_linear(hidden, weights[0], norm=(norm, EPSILON), interpret=interpret)
    return skinny_linear(qkv[:, : weights[1].shape[1]], weights[1], residual=hidden, interpret=interpret)


def plain_attention(hidden: jax.Array, norm: jax.Array, weights: list[jax.Array]) -> jax.Array:
    qkv = linear(rms_norm(hidden, norm, EPSILON), weights[0])
    return hidden + linear(qkv[:, : weights[1].shape[1]], weights[1])


def logits(interpret: bool, hidden: jax.Array, norm: jax.Array, weights: list[jax.Array]) -> jax.Array:
    return skinny_linear(hidden, weights[0], norm=(norm, EPSILON), output_dtype=jnp.float32, interpret=interpret)


def plain_logits(hidden: jax.Array, norm: jax.Array, weights: list[jax.Array]) -> jax.Array:
    return linear(rms_norm(hidden, norm, EPSILON), weights[0], output_dtype=jnp.float32)


def links(sizes: Sizes, interpret: bool) -> dict[str, tuple[Link, Link, list[tuple[int, ...]]]]:
    """Of each kind of link: ours, the plain one, and the shapes of its weights."""
    return {
        "feed_forward": (
            partial(feed_forward, interpret),
            plain_feed_forward,
            [(2, sizes.ffn, sizes.hidden), (sizes.hidden, sizes.ffn)],
        ),
        "attention": (
            partial(attention, interpret),
            plain_attention,
            [(sizes.qkv, sizes.hidden), (sizes.hidden, sizes.attended)],
        ),
        "logits": (partial(logits, interpret), plain_logits, [(sizes.vocab, sizes.hidden)]),
    }


def chain(link: Link, hidden: jax.Array, norm: jax.Array, weights: list[list[jax.Array]]) -> jax.Array:
    """Link after link; what is as wide as the vocabulary hands one value on."""
    out = hidden
    for own in weights:
        out = link(hidden, norm, own)
        hidden = out if out.shape == hidden.shape else hidden + (out[:, :1] * 0).astype(hidden.dtype)
    return out


class Compiled(NamedTuple):
    ours: Any
    plain: Any
    ours_once: Any
    compile_seconds: float  # of ours, beside other compilations


def compile_case(case: tuple[Link, Link, list[tuple[int, ...]]], num_rows: int, hidden_size: int) -> Compiled:
    ours, plain, shapes = case
    own = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    args = (
        jax.ShapeDtypeStruct((num_rows, hidden_size), jnp.bfloat16),
        jax.ShapeDtypeStruct((hidden_size,), jnp.bfloat16),
    )
    start = time.perf_counter()
    chained = jax.jit(partial(chain, jax.jit(ours))).lower(*args, [own] * count_links(shapes)).compile()
    seconds = time.perf_counter() - start
    plain_chained = jax.jit(partial(chain, jax.jit(plain))).lower(*args, [own] * count_links(shapes)).compile()
    return Compiled(chained, plain_chained, jax.jit(ours).lower(*args, own).compile(), seconds)


def weight_bytes(shapes: list[tuple[int, ...]]) -> int:
    return sum(2 * math.prod(shape) for shape in shapes)


def count_links(shapes: list[tuple[int, ...]]) -> int:
    return max(2, min(24, round(CHAIN_BYTES / weight_bytes(shapes)))) if weight_bytes(shapes) > 1e6 else 1


def random_weights(shapes: list[tuple[int, ...]], seed: int) -> list[jax.Array]:
    """Scaled so that a chain of them keeps its magnitude."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5 for key, shape in zip(keys, shapes, strict=True)
    ]


def measure_error(plain: Link, out: jax.Array, hidden: jax.Array, norm: jax.Array, weights: list[jax.Array]) -> float:
    upcast = [array.astype(jnp.float32) for array in (hidden, norm, *weights)]
    expected = plain(upcast[0], upcast[1], upcast[2:])
    return float(jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


def time_call(function: Any, args: tuple, num_repeats: int) -> float:
    """Median seconds of a call, of several queued one behind the other."""
    for _ in range(min(3, num_repeats - 1)):
        jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(num_repeats):
        start = time.perf_counter()
        jax.block_until_ready([function(*args) for _ in range(num_repeats)])
        seconds.append((time.perf_counter() - start) / num_repeats)
    return statistics.median(seconds)


def measure_read_bandwidth(size: int, num_repeats: int) -> float:
    """Bytes a second of summing an array."""
    array = jax.random.normal(jax.random.key(0), (size,), jnp.bfloat16)
    return array.nbytes / time_call(jax.jit(partial(jnp.sum, dtype=jnp.float32)), (array,), num_repeats)


def run_case(
    case: tuple[Link, Link, list[tuple[int, ...]]],
    compiled: Compiled,
    num_rows: int,
    hidden_size: int,
    ceiling: float,
    num_repeats: int,
) -> dict[str, Any]:
    _, plain, shapes = case
    hidden = jax.random.normal(jax.random.key(1), (num_rows, hidden_size), jnp.bfloat16)
    norm = jax.random.normal(jax.random.key(2), (hidden_size,), jnp.bfloat16)
    weights = [random_weights(shapes, seed) for seed in range(count_links(shapes))]
    error = measure_error(plain, compiled.ours_once(hidden, norm, weights[0]), hidden, norm, weights[0])
    row: dict[str, Any] = {"error": round(error, 5), "compile_seconds": round(compiled.compile_seconds, 2)}
    for name, function in (("xla", compiled.plain), ("ours", compiled.ours)):
        seconds = time_call(function, (hidden, norm, weights), num_repeats) / len(weights)
        share = weight_bytes(shapes) / seconds / ceiling
        row |= {f"{name}_us": round(seconds * 1e6, 2), f"{name}_share": round(share, 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, interpreted")
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--rows", type=int, action="append", help="1, 8 and 64 if not given")
    options = parser.parse_args()
    models = SMOKE_MODELS if options.smoke else {name: one for name, one in MODELS.items() if options.only in name}
    cases = [
        (model, kind, num_rows, sizes.hidden, case)
        for model, sizes in models.items()
        for kind, case in links(sizes, options.smoke).items()
        for num_rows in options.rows or ([2] if options.smoke else [1, 8, 64])
    ]
    with ThreadPoolExecutor(16) as pool:  # all before the first is timed: compiling tries kernels out on the GPU
        jobs = [pool.submit(compile_case, case, num_rows, hidden) for _, _, num_rows, hidden, case in cases]
    num_repeats = 1 if options.smoke else 5
    ceiling = measure_read_bandwidth(2**20 if options.smoke else 2**29, num_repeats)
    print(
        json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "read_bandwidth": ceiling}),
        flush=True,
    )
    for (model, kind, num_rows, hidden, case), job in zip(cases, jobs, strict=True):
        try:
            row = run_case(case, job.result(), num_rows, hidden, ceiling, num_repeats)
        except Exception as error:  # one size that fails must not hide the others
            row = {"failed": str(error)[:300]}
        print(json.dumps({"model": model, "link": kind, "rows": num_rows, **row}), flush=True)


if __name__ == "__main__":
    main()
