"""A GPU kernel of one's own in Pallas (Mosaic GPU, Hopper), used as a logits processor: logits softly capped at 30."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.batch import SamplingInputs

CAP = 30.0
COLUMNS = 128  # of one block; divides the vocabularies of Qwen2 and Qwen3, and the demo model's


def soft_cap_reference(logits: jax.Array) -> jax.Array:
    """The definition, in plain JAX: what the kernel is tested against, and what runs elsewhere."""
    return CAP * jnp.tanh(logits / CAP)


def soft_cap_kernel(logits: jax.Array, interpret: Any = None) -> jax.Array:
    """The same by one block of a row a thread group: to shared memory, through the registers, and back."""
    num_rows, vocab_size = logits.shape

    def body(logits_ref, capped_ref, shared, barrier):
        row, column = lax.axis_index("row"), lax.axis_index("column") * COLUMNS
        plgpu.copy_gmem_to_smem(logits_ref.at[row, pl.ds(column, COLUMNS)], shared, barrier.at[0])
        plgpu.barrier_wait(barrier.at[0])
        shared[...] = CAP * jnp.tanh(shared[...] / CAP)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared, capped_ref.at[row, pl.ds(column, COLUMNS)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(logits.shape, logits.dtype),
        scratch_types=[plgpu.SMEM((COLUMNS,), logits.dtype), plgpu.Barrier(num_barriers=1)],
        grid=(num_rows, vocab_size // COLUMNS),
        grid_names=("row", "column"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(logits)


def soft_cap(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """What the engine traces into its step: the kernel where it runs."""
    return soft_cap_kernel(logits) if jax.default_backend() == "gpu" else soft_cap_reference(logits)


if __name__ == "__main__":
    llm = LLM("demo", max_num_seqs=4, max_num_batched_tokens=64, logits_processors=[soft_cap])
    for output in llm.generate(["12 + 7 =", "Once upon a time"], SamplingParams(temperature=0, max_tokens=24)):
        print(repr(output.outputs[0].text))
