"""Matrix products of few rows, bound by reading the weights, with what stands around them (Pallas, Mosaic GPU).

Letters: T rows, I inputs, O outputs; W weights (1, or gate and up).

A program for each multiprocessor takes tiles of a few outputs in turn. All its warps share the inputs of a tile, each
loading 16 bytes a thread straight into the registers of the tensor cores, which take the weights as their right operand
(their eight columns are as many outputs; or, of at most 8 rows, four outputs at two places along the inputs) and the
rows as their left. The loads of a tile are on their way while the one before is multiplied, and those of the first
while the program normalizes the inputs, which it does for itself. Sums of a warp are added in the order of warps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from miniinfer_jax.pallas_kernels import mosaic, skinny_threads
from miniinfer_jax.pallas_kernels.skinny_plan import THREADS, WARPS, Spec, choose_plan, unsupported

__all__ = ["skinny_gated_linear", "skinny_linear", "unsupported"]

Norm = tuple[jax.Array, float]  # weight [I], epsilon


class Refs(NamedTuple):
    """What a program sees; the last three are in shared memory."""

    inputs: Any  # [T, I]
    weights: Any  # [W, O, I]
    norm_weight: Any  # [I], or None
    bias: Any  # [O], or None
    residual: Any  # [T, O], or None
    out: Any  # [T, O]
    operand: Any  # [T, stride], the inputs as they are multiplied
    sums: Any  # [2, slots, T, W, outputs of a tile] float32, of every other tile
    squares: Any  # [T, warps] float32


def skinny_linear(
    inputs: jax.Array,
    weight: jax.Array,
    *,
    norm: Norm | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    output_dtype: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """residual + (rms_norm(inputs) @ weight.T + bias), each part rounded where the plain operations do -> [T, O].

    inputs [T, I], weight [O, I], norm (weight [I], epsilon), bias [O], residual [T, O].
    """
    return _multiply(inputs, weight[None], norm, bias, residual, output_dtype or inputs.dtype, interpret)


def skinny_gated_linear(
    inputs: jax.Array, weight: jax.Array, *, norm: Norm | None = None, interpret: bool = False
) -> jax.Array:
    """silu(gate) * up of gate, up = rms_norm(inputs) @ weight.T, inputs [T, I], weight [2, F, I] -> [T, F]."""
    return _multiply(inputs, weight, norm, None, None, inputs.dtype, interpret)


def _multiply(
    inputs: jax.Array,
    weights: jax.Array,
    norm: Norm | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    output_dtype: Any,
    interpret: bool,
) -> jax.Array:
    num_rows, (num_weights, output_size, input_size) = inputs.shape[0], weights.shape
    if reason := unsupported(num_rows, input_size, output_size, inputs.dtype, num_weights):
        raise ValueError(f"skinny linear cannot run: {reason}")
    if inputs.dtype != weights.dtype:
        raise ValueError(f"skinny linear cannot run: inputs are {inputs.dtype}, weights are {weights.dtype}")
    spec = Spec(
        plan=choose_plan(num_rows, input_size, output_size, num_weights),
        num_rows=num_rows,
        input_size=input_size,
        output_size=output_size,
        num_weights=num_weights,
        dtype=inputs.dtype,
        output_dtype=jnp.dtype(output_dtype),
        epsilon=None if norm is None else norm[1],
        has_bias=bias is not None,
        has_residual=residual is not None,
        interpret=interpret,
    )
    optional = (None if norm is None else norm[0], bias, residual)
    return _launch(spec, inputs, weights, *[array.astype(inputs.dtype) for array in optional if array is not None])


@functools.partial(jax.jit, static_argnums=0)  # kernels of one jit are compiled once, however often it is called
def _launch(spec: Spec, *arrays: jax.Array) -> jax.Array:
    def kernel(*refs: Any) -> None:
        _kernel(spec, *refs)

    # A trace shows it by this name, and benchmark/hlo_text.py reads the sizes from it.
    kernel.__name__ = f"skinny_{spec.input_size}_to_{spec.num_weights * spec.output_size}"
    launch = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((spec.num_rows, spec.output_size), spec.output_dtype),
        scratch_types=[
            plgpu.SMEM((spec.num_rows, spec.operand_stride), spec.dtype),
            plgpu.SMEM((2, spec.num_slots, spec.slot_size), jnp.float32),
            plgpu.SMEM((spec.num_rows, WARPS), jnp.float32),
        ],
        grid=(spec.num_programs,),
        grid_names=("program",),
        num_threads=THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": mosaic.interpreter()} if spec.interpret else {}),
    )
    return launch(*arrays)


def _kernel(spec: Spec, inputs: Any, weights: Any, *others: Any) -> None:
    rest = list(others)
    has_optional = (spec.epsilon is not None, spec.has_bias, spec.has_residual)
    refs = Refs(inputs, weights, *[rest.pop(0) if is_there else None for is_there in has_optional], *rest)
    if spec.interpret:
        pl.when(lax.axis_index("warpgroup") == 0)(functools.partial(_interpret, spec, refs))
        return
    present = [ref for ref in refs if ref is not None]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(present))
    def run(_: Any, *memrefs: Any) -> None:
        rest = list(memrefs)
        skinny_threads.emit(spec, Refs(*[None if ref is None else rest.pop(0) for ref in refs]))

    run(*present)  # pyright: ignore[reportCallIssue]


def _interpret(spec: Spec, refs: Refs) -> None:
    """What all threads of a program do, as array operations: the CPU's interpreter knows no single thread."""
    inputs = refs.inputs[...]
    if spec.epsilon is not None:
        values = inputs.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + spec.epsilon)
        inputs = (values * scale).astype(spec.dtype) * refs.norm_weight[...]

    def visit(turn: jax.Array, _: None) -> None:
        tile = turn * spec.num_programs + lax.axis_index("program")
        outputs = pl.ds(tile * spec.plan.tile_outputs, spec.plan.tile_outputs)
        products = [
            jnp.dot(inputs, refs.weights[index, outputs].T, preferred_element_type=jnp.float32)
            for index in range(spec.num_weights)
        ]
        result = products[0].astype(spec.output_dtype)
        if spec.num_weights == 2:
            gate, up = (one.astype(spec.dtype).astype(jnp.float32) for one in products)
            result = ((gate / (1 + jnp.exp(-gate))).astype(spec.dtype) * up).astype(spec.output_dtype)
        if refs.bias is not None:
            result = result + refs.bias[outputs].astype(spec.output_dtype)
        if refs.residual is not None:
            result = result + refs.residual[:, outputs].astype(spec.output_dtype)
        refs.out[:, outputs] = result

    turns = lax.div(spec.num_tiles - 1 - lax.axis_index("program"), jnp.int32(spec.num_programs)) + 1
    lax.fori_loop(jnp.int32(0), turns, visit, None)
