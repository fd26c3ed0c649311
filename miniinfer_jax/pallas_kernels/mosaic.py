"""What the Mosaic GPU kernels share: what they take, what differs between jax 0.10.2 and 0.11.2, and stand-ins
for what its CPU interpreter lacks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

IS_0_11 = hasattr(plgpu, "InterpretGPUParams")  # or newer

# What the attention kernels take.
HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = ("bfloat16", "float16")


def attention_unsupported(head_dim: int, page_size: int, page_sizes: Sequence[int], dtype: Any) -> str | None:
    """Why an attention kernel for pages of page_sizes cannot run these, with what it takes; None where it can."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"dtype {name}: takes {' or '.join(DTYPES)} (the tensor cores would round float32 to 10 bits)"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}: takes {', '.join(map(str, HEAD_DIMS))}"
    if page_size not in page_sizes:
        return f"page_size {page_size}: takes {', '.join(map(str, page_sizes))}"
    return None


def transposed(ref: Any) -> Any:
    """The view of a two-dimensional ref with its axes swapped."""
    return ref.transpose((1, 0)) if IS_0_11 else plgpu.transpose_ref(ref, (1, 0))


def interpreter() -> Any:
    """What `interpret=` takes to run a kernel on the CPU."""
    if IS_0_11:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams  # pyright: ignore[reportAttributeAccessIssue]
    else:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    return InterpretGPUParams()


def full(shape: Sequence[int], value: float, layout: Any, interpret: bool) -> jax.Array:
    """A float32 array of one value in the layout."""
    array = jnp.full(shape, value, jnp.float32)
    return array if interpret else plgpu.layout_cast(array, layout)


def iota(shape: Sequence[int], axis: int, layout: Any, interpret: bool) -> jax.Array:
    """int32 indices along the axis, in the layout."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, tuple(shape), axis, layout=layout)


def load(ref: Any, layout: Any, interpret: bool) -> jax.Array:
    """A ref's content in the layout, also where no fast way to read it exists."""
    if interpret:
        return ref[...]
    indices = () if IS_0_11 else ((),)
    return plgpu.load(ref, *indices, layout=layout, optimized=False)


def product_transposed(left: Any, right: Any, shape: tuple[int, int], interpret: bool) -> jax.Array:
    """left @ right.T of two arrays in shared memory, in float32, by the tensor cores."""
    if interpret:
        return jnp.dot(left[...], right[...].T, preferred_element_type=jnp.float32)

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, left, transposed(right))
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def plus_product(total: jax.Array, left: jax.Array, right: Any, interpret: bool) -> jax.Array:
    """total + left @ right, total and left in registers, right in shared memory, by the tensor cores."""
    if interpret:
        return total + jnp.dot(left, right[...], preferred_element_type=jnp.float32)

    def multiply(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, left, right)

    summed: Any = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(total))
    return summed
