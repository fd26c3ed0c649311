"""A GPU kernel of one's own in Triton, bound by jax-triton (extras cuda12, cuda13): logits softly capped at 30."""

import jax
import jax.numpy as jnp

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.batch import SamplingInputs

CAP = 30.0
BLOCK = 1024  # elements of one program


def soft_cap_reference(logits: jax.Array) -> jax.Array:
    """The definition, in plain JAX: what the kernel is tested against, and what runs without a GPU."""
    return CAP * jnp.tanh(logits / CAP)


def soft_cap_kernel(logits: jax.Array) -> jax.Array:
    """The same by one block of elements a Triton program; works on any NVIDIA GPU that Triton serves."""
    # Imported here: Triton is there with a GPU's extra alone.
    import jax_triton  # pyright: ignore[reportMissingImports]
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def body(logits_pointer, num_elements, capped_pointer, cap: tl.constexpr, block: tl.constexpr):
        offsets = tl.program_id(0) * block + tl.arange(0, block)
        is_element = offsets < num_elements
        scaled = tl.load(logits_pointer + offsets, mask=is_element) / cap
        # tanh by the exponential that Triton has on every target.
        capped = cap * (1 - 2 / (tl.exp(2 * scaled) + 1))
        tl.store(capped_pointer + offsets, capped, mask=is_element)

    return jax_triton.triton_call(
        logits,
        logits.size,
        kernel=body,
        out_shape=jax.ShapeDtypeStruct(logits.shape, logits.dtype),
        grid=(triton.cdiv(logits.size, BLOCK),),
        cap=CAP,
        block=BLOCK,
    )


def soft_cap(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """What the engine traces into its step: the kernel where it runs."""
    return soft_cap_kernel(logits) if jax.default_backend() == "gpu" else soft_cap_reference(logits)


if __name__ == "__main__":
    llm = LLM("demo", max_num_seqs=4, max_num_batched_tokens=64, logits_processors=[soft_cap])
    for output in llm.generate(["12 + 7 =", "Once upon a time"], SamplingParams(temperature=0, max_tokens=24)):
        print(repr(output.outputs[0].text))
