"""How likely does the model find a text? The same forward that generates gives every token's log-probability."""

from miniinfer_jax import LLM

llm = LLM("demo", max_num_seqs=8)
texts = ["12 + 34 = 46", "12 + 34 = 47"]
for text, score in zip(texts, llm.score(texts), strict=True):
    known = [logprob for logprob in score.logprobs if logprob is not None]  # nothing comes before the first token
    print(f"{text!r}: {sum(known):.3f} over {len(known)} tokens")
