"""What the device really gives: bytes read a second and floating-point operations a second, measured in this run.

Random data throughout: on zeros, power draw and with it the clock are not those of real work.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from miniinfer_jax.benchmark.roofline import Ceilings

NUM_REPEATS = 5
NUM_QUEUED = 10  # calls in one timing, so that starting and waiting for them does not count


def best_seconds(compute: Callable[[], jax.Array]) -> float:
    """The shortest time of one call, compilation left out."""
    compute().block_until_ready()
    times = []
    for _ in range(NUM_REPEATS):
        started_at = time.perf_counter()
        results = [compute() for _ in range(NUM_QUEUED)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - started_at) / NUM_QUEUED)
    return min(times)


def measure_read_rate(num_bytes: int) -> float:
    """Bytes a second of adding up an array that no cache holds."""
    row_length = 8192
    key = jax.random.key(0, impl="rbg")  # quick to draw gigabytes from
    values = jax.random.bits(key, (num_bytes // (4 * row_length), row_length), jnp.uint32)
    return values.nbytes / best_seconds(lambda: jnp.sum(values, axis=1))


def measure_matmul_rate(size: int, dtype: str) -> float:
    """Operations a second of a square matrix product, a multiply-add counted as two."""
    keys = jax.random.split(jax.random.key(1))
    left, right = (jax.random.normal(key, (size, size), jnp.float32).astype(dtype) for key in keys)
    return 2 * size**3 / best_seconds(lambda: jnp.matmul(left, right))


def measure_ceilings(dtype: str) -> Ceilings:
    """The ceilings of the first device, for matrix products in `dtype`; about a second of work."""
    is_cpu = jax.devices()[0].platform == "cpu"
    return Ceilings(
        bytes_per_second=measure_read_rate(2**27 if is_cpu else 2**32),
        operations_per_second=measure_matmul_rate(1024 if is_cpu else 8192, dtype),
    )
