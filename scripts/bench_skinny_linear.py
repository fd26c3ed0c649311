"""The products of a layer at few rows, by the kernel and by XLA: microseconds and share of the read bandwidth.

python scripts/bench_skinny_linear.py                   # on a Hopper GPU
python scripts/bench_skinny_linear.py --only 0.6b --rows 1,8
python scripts/bench_skinny_linear.py --small           # a rehearsal on a CPU: tiny, the kernel interpreted

A JSON line each. Timed are chains in one jitted function, each product after the one before, with weights of their own
that together exceed the cache. "o" and "down" hand the residual on. "qkv" and "gate_up" need all of the hidden states
before they start, as in a model; so each is timed with a product that leads back to them, and that one is timed alone
and taken off. Hidden states are donated: buffers stay where they are, and the GPU replays one graph. The error is
|out - ref| / |ref| of a link against float32.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import typer

from miniinfer_jax.benchmark.ceilings import measure_read_rate
from miniinfer_jax.ops.linear import PLAIN, Products
from miniinfer_jax.pallas_kernels.skinny_linear import skinny_gated_linear, skinny_linear, unsupported

EPSILON = 1e-6
CHAIN_BYTES = 150e6  # of weights, several times what a GPU's cache holds
MIN_LINKS = 20
Shape = tuple[int, ...]


class Sizes(NamedTuple):
    hidden: int
    qkv: int
    attended: int
    ffn: int


MODELS = {
    "qwen2.5-0.5b": Sizes(896, 1152, 896, 4864),
    "qwen3-0.6b": Sizes(1024, 4096, 2048, 3072),
    "qwen2.5-7b": Sizes(3584, 4608, 3584, 18944),
}
ROWS = "1,2,4,8,16,32,64"
SMALL_MODELS = {"small": Sizes(128, 192, 64, 128)}


class Chain(NamedTuple):
    """One or two products a link: from hidden states, normalized, and back to them with the residual."""

    opening: Shape | None  # [O, D], or [2, F, D] if gated
    closing: Shape  # [D, I]

    @property
    def shapes(self) -> list[Shape]:
        return [shape for shape in (self.opening, self.closing) if shape is not None]

    @property
    def num_bytes(self) -> int:
        return sum(2 * math.prod(shape) for shape in self.shapes)


def chains(sizes: Sizes) -> dict[str, tuple[Chain, Chain | None]]:
    """Of each product the chain that it is in, and the chain to take off."""
    ffn, hidden = sizes.ffn, sizes.hidden
    back, down = Chain(None, (hidden, sizes.qkv)), Chain(None, (hidden, ffn))
    return {
        "qkv": (Chain((sizes.qkv, hidden), (hidden, sizes.qkv)), back),
        "o": (Chain(None, (hidden, sizes.attended)), None),
        "gate_up": (Chain((2, ffn, hidden), (hidden, ffn)), down),
        "down": (down, None),
    }


def is_supported(num_rows: int, shape: Shape) -> bool:
    return unsupported(num_rows, shape[-1], shape[-2], "bfloat16", len(shape) - 1) is None


def kernels(interpret: bool) -> Products:
    """By the kernel where it can, else by XLA."""

    def single(inputs: jax.Array, weight: jax.Array, **others: Any) -> jax.Array:
        if not is_supported(inputs.shape[0], weight.shape):
            return PLAIN.linear(inputs, weight, **others)
        return skinny_linear(inputs, weight, **others, interpret=interpret)

    def gated(inputs: jax.Array, weight: jax.Array, activation: str, *, norm: Any) -> jax.Array:
        if not is_supported(inputs.shape[0], weight.shape):
            return PLAIN.gated_linear(inputs, weight, activation, norm=norm)
        return skinny_gated_linear(inputs, weight, norm=norm, interpret=interpret)

    return Products(single, gated)


def run_link(
    products: Products, hidden: jax.Array, others: jax.Array, norm: jax.Array, own: list[jax.Array]
) -> jax.Array:
    """hidden [T, D] -> [T, D]; others [T, I] stand for what a chain without an opening closes with."""
    if len(own) == 1:
        return products.linear(others, own[0], residual=hidden)
    if own[0].ndim == 3:
        opened = products.gated_linear(hidden, own[0], "silu", norm=(norm, EPSILON))
    else:
        opened = products.linear(hidden, own[0], norm=(norm, EPSILON))
    return products.linear(opened, own[1], residual=hidden)


def run_chain(products: Products, hidden: jax.Array, others: jax.Array, norm: jax.Array, weights: list) -> jax.Array:
    link = jax.jit(partial(run_link, products))
    for own in weights:
        hidden = link(hidden, others, norm, own)
    return hidden


def count_links(chain: Chain) -> int:
    return max(MIN_LINKS, math.ceil(CHAIN_BYTES / chain.num_bytes)) if chain.num_bytes > 1e6 else 1


def random_weights(chain: Chain) -> list[list[jax.Array]]:
    """Of each link, scaled so that a chain keeps its magnitude."""

    @jax.jit
    def make(seed: int) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(seed), len(chain.shapes))
        return [
            jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5
            for key, shape in zip(keys, chain.shapes, strict=True)
        ]

    return [make(seed) for seed in range(count_links(chain))]


def random_rows(chain: Chain, num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(hidden, others, norm) of `run_link`."""
    hidden_size, closing_size = chain.closing
    keys = jax.random.split(jax.random.key(1000), 3)
    sizes = ((num_rows, hidden_size), (num_rows, closing_size), (hidden_size,))
    hidden, others, norm = (jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True))
    return hidden, others, norm


class Compiled(NamedTuple):
    chains: dict[str, Any]  # by implementation
    link: Any  # a single one, by the kernel


def compile_chain(chain: Chain, num_rows: int, interpret: bool) -> Compiled:
    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    size = chain.closing[0]
    arguments = (shape(num_rows, size), shape(num_rows, chain.closing[1]), shape(size))
    own = [shape(*one) for one in chain.shapes]
    implementations = {"xla": PLAIN, "kernel": kernels(interpret)}
    compiled = {
        name: jax.jit(partial(run_chain, products), donate_argnums=0)
        .lower(*arguments, [own] * count_links(chain))
        .compile()
        for name, products in implementations.items()
    }
    return Compiled(compiled, jax.jit(partial(run_link, kernels(interpret))).lower(*arguments, own).compile())


def measure_error(link: Any, rows: tuple, own: list[jax.Array]) -> float:
    hidden, others, norm, *upcast = (array.astype(jnp.float32) for array in (*rows, *own))
    expected = run_link(PLAIN, hidden, others, norm, upcast)
    out = link(*rows, own)
    return float(jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


def time_calls(function: Callable[[jax.Array], jax.Array], donated: jax.Array, num_repeats: int) -> float:
    """Median seconds of a call, of several queued one behind the other, each with what the last one returned."""
    seconds = []
    for _ in range(num_repeats + 1):
        start = time.perf_counter()
        for _ in range(num_repeats):
            donated = function(donated)
        jax.block_until_ready(donated)
        seconds.append((time.perf_counter() - start) / num_repeats)
    return statistics.median(seconds[1:])  # the first calls record the graph


def measure_chain(
    chain: Chain, compiled: Compiled, num_rows: int, weights: list[list[jax.Array]], num_repeats: int
) -> dict[str, float]:
    """Seconds of a link by implementation, and the kernel's "error"."""
    hidden, others, norm = random_rows(chain, num_rows)
    measured = {"error": measure_error(compiled.link, (hidden, others, norm), weights[0])}
    for name, function in compiled.chains.items():
        seconds = time_calls(lambda x, run=function: run(x, others, norm, weights), hidden.copy(), num_repeats)
        measured[name] = seconds / len(weights)
    return measured


def describe(
    chain: Chain, taken_off: Chain | None, num_rows: int, own: dict, other: dict | None, ceiling: float
) -> dict[str, Any]:
    """The figures of the first product of a chain."""
    row: dict[str, Any] = {}
    num_bytes = chain.num_bytes - (taken_off.num_bytes if taken_off else 0)
    for name in ("xla", "kernel") if is_supported(num_rows, chain.shapes[0]) else ("xla",):
        seconds = own[name] - (other[name] if other else 0)
        share = num_bytes / seconds / ceiling
        row |= {f"{name}_us": round(seconds * 1e6, 2), f"{name}_share": round(share, 3)}
    return row | {"error": round(own["error"], 5)}


def main(
    only: Annotated[str, typer.Option(help="Words that a model's name contains.")] = "",
    rows: Annotated[str, typer.Option(help="Comma-separated; beyond what the kernel takes, XLA alone.")] = ROWS,
    small: Annotated[bool, typer.Option("--small", help="A rehearsal on a CPU.")] = False,
) -> None:
    """Prints the device and its read rate, then a line for each product and number of rows."""
    models = SMALL_MODELS if small else {name: one for name, one in MODELS.items() if only in name}
    if not models:
        raise typer.BadParameter(f"no model's name contains {only!r}; there are: {', '.join(MODELS)}")
    all_rows = [2] if small else [int(size) for size in rows.split(",")]
    num_repeats = 1 if small else 5
    # All before the first is timed: compiling tries kernels out on the GPU.
    with ThreadPoolExecutor(16) as pool:
        jobs = {
            (chain, num_rows): pool.submit(compile_chain, chain, num_rows, small)
            for sizes in models.values()
            for pair in chains(sizes).values()
            for chain in dict.fromkeys(one for one in pair if one)
            for num_rows in all_rows
        }
    ceiling = measure_read_rate(2**22 if small else 2**30)
    header = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "read_gigabytes": ceiling / 1e9}
    print(json.dumps(header), flush=True)
    for model, sizes in models.items():
        measured: dict[tuple[Chain, int], dict] = {}
        for product, (chain, taken_off) in chains(sizes).items():
            for one in (chain, taken_off):
                if one is not None and (one, all_rows[0]) not in measured:
                    weights = random_weights(one)
                    for num_rows in all_rows:
                        compiled = jobs[one, num_rows].result()
                        measured[one, num_rows] = measure_chain(one, compiled, num_rows, weights, num_repeats)
                    del weights
            for num_rows in all_rows:
                row = {"model": model, "product": product, "rows": num_rows}
                own, other = measured[chain, num_rows], measured[taken_off, num_rows] if taken_off else None
                print(json.dumps(row | describe(chain, taken_off, num_rows, own, other, ceiling)), flush=True)


if __name__ == "__main__":
    typer.run(main)
