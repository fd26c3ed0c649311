"""Continue two prompts with the model that ships."""

from miniinfer_jax import LLM, SamplingParams

llm = LLM("demo", max_num_seqs=8)
prompts = ["Once upon a time", "12 + 34 ="]
for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24)):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
