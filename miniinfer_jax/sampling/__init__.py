"""From logits to tokens: `sample` draws one token a row, `score_tokens` rates tokens that are already there."""

from miniinfer_jax.sampling.sample import sample, sample_plain, score_tokens
from miniinfer_jax.sampling.transforms import LogitsProcessor

__all__ = ["LogitsProcessor", "sample", "sample_plain", "score_tokens"]
