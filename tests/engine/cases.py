"""What the tests of the engine share: a small engine's arguments, prompts and sampling parameters."""

import numpy as np

from miniinfer_jax import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SMALL = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "skip_tokenizer_init": True,
    "use_tqdm": False,
}


def make_prompts(count: int, longest: int = 150, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(4, 97, size).tolist() for size in generator.integers(1, longest, count)]


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]
