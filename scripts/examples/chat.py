"""A conversation: the messages so far are what the model reads before every answer."""

from miniinfer_jax import LLM, SamplingParams

llm = LLM("demo", max_num_seqs=8)
messages = []
for question in ["What is 12 + 34?", "Sort the letters: dcab"]:
    messages.append({"role": "user", "content": question})
    answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=32))[0].outputs[0].text
    messages.append({"role": "assistant", "content": answer})
    print(f"{question} {answer}")
