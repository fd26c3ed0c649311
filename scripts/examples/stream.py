"""Print a story while it is being written."""

from miniinfer_jax import LLM, SamplingParams

llm = LLM("demo", max_num_seqs=8)
for delta in llm.stream(["Once upon a time"], SamplingParams(temperature=0.8, seed=1, max_tokens=60)):
    print(delta.text, end="", flush=True)
print()
