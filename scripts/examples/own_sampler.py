"""A sampler of one's own: a pure function of the logits, traced into the step on the device."""

import jax
import jax.numpy as jnp

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.batch import SamplingInputs


def keep_the_two_likeliest(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Logits [B, V] with all but the two largest of each row at minus infinity."""
    second = jax.lax.top_k(logits, 2)[0][:, 1:]  # [B, 1]
    return jnp.where(logits >= second, logits, -jnp.inf)


llm = LLM("demo", max_num_seqs=4, max_num_batched_tokens=64, logits_processors=[keep_the_two_likeliest])
params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=24) for seed in range(3)]
for output in llm.generate(["Once upon a time"] * 3, params):
    print(repr(output.outputs[0].text))
