"""A request, or an engine, that cannot work is refused by name and with a remedy, and harms nobody."""

import numpy as np
import pytest

from miniinfer_jax import LLM, SamplingParams
from tests.engine.cases import GREEDY, SMALL, make_prompts, tokens_of

pytestmark = pytest.mark.usefixtures("pages_come_back")


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "empty"),
        ([97], {}, "vocabulary is 0 to 96"),
        ([-1], {}, "vocabulary"),
        ([True], {}, "vocabulary"),
        (["a"], {}, "token id"),
        ([4] * 256, {}, "max_model_len is 256"),
        ([4], {"logprobs": 21}, "limit of 20"),
        ([4], {"stop": "x"}, "tokenizer"),
        ([4], {"bad_words": ["x"]}, "tokenizer"),
        ([4], {"allowed_token_ids": [3], "min_tokens": 2}, "ends the sequence"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "chat template"),
        (b"abc", {}, "bytes"),
        ([4], {"allowed_token_ids": [200]}, "vocabulary"),
        ([4], {"logit_bias": {200: 1.0}}, "vocabulary"),
        ("text", {}, "tokenizer"),
        ({"prompt": "a", "prompt_token_ids": [1]}, {}, "exactly one"),
        ({"text": "a"}, {}, "exactly one"),
        ({"prompt_token_ids": "abc"}, {}, "must be a list"),
        ({"prompt": [4, 5]}, {}, "must be a text"),
    ],
)
def test_bad_requests_fail_alone(llm, expected, prompt, params, words):
    bad = SamplingParams(**params)
    with pytest.raises(ValueError, match=words):
        llm.generate([prompt], bad, use_tqdm=False)
    with pytest.raises(ValueError, match=words):
        llm.stream([prompt], bad)
    outputs = llm.generate([make_prompts(10)[0], prompt], [GREEDY, bad], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == expected[0]
    assert outputs[1].finished and outputs[1].outputs[0].finish_reason == "error"
    assert words in outputs[1].error


def test_a_prompt_longer_than_the_pool_says_what_to_raise(folder):
    llm = LLM(folder, num_pages=5, **{name: value for name, value in SMALL.items() if name != "max_model_len"})
    with pytest.raises(ValueError, match="raise num_pages by 3"):
        llm.generate([[4] * 120], GREEDY, use_tqdm=False)


def test_numpy_numbers_are_numbers(llm, expected):
    params = SamplingParams(temperature=np.float32(0), max_tokens=np.int64(20), ignore_eos=True)
    prompts = [np.array(prompt) for prompt in make_prompts(10)]
    assert tokens_of(llm.generate(prompts[1], params, use_tqdm=False)) == [expected[1]]
    assert tokens_of(llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)) == expected


def test_scores_of_good_prompts_survive_a_bad_one(llm):
    good, bad = llm.score([[4, 5, 6], []], use_tqdm=False)
    assert len(good.logprobs) == 3 and good.error is None
    assert "empty" in bad.error
    with pytest.raises(ValueError, match="empty"):
        llm.score([[]], use_tqdm=False)


@pytest.mark.parametrize("params", [{"temperature": 0}, 5, [GREEDY, None]])
def test_sampling_params_of_another_type(llm, params):
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate([[4], [5]], params, use_tqdm=False)


@pytest.mark.parametrize("prompts", [None, 5, b"abc"])
def test_prompts_of_another_type(llm, prompts):
    with pytest.raises(ValueError, match="give a prompt"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


def test_a_pool_too_small_for_one_request_says_what_to_raise(folder):
    llm = LLM(folder, num_pages=5, **SMALL)
    with pytest.raises(ValueError, match="raise num_pages by 2"):
        llm.generate([[4] * 80], SamplingParams(max_tokens=30), use_tqdm=False)
    assert llm.generate([[4] * 60], GREEDY, use_tqdm=False)[0].finished


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": 513}, "lower max_model_len"),
        ({"page_size": 0}, "page_size"),
        ({"dtype": "int8"}, "dtype"),
        ({"load_format": "gguf"}, "load_format"),
        ({"attention_backend": "magic"}, "known: auto, pallas, cudnn, xla, xla-tiled"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_engine_arguments(folder, arguments, words):
    with pytest.raises(ValueError, match=words):
        LLM(folder, **SMALL | arguments)
