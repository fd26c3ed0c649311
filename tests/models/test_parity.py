"""A checkpoint of transformers gives the logits, the tokens and the log-probabilities that transformers gives.

Asked live where torch is installed, and always against the goldens of make_goldens.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import (
    CASES,
    GOLDEN_CASES,
    GOLDENS,
    HALF_CASES,
    NUM_GREEDY,
    Expected,
    load_expected,
    write_checkpoint,
)

from miniinfer_jax import LLM, SamplingParams, kv_cache
from miniinfer_jax.batch import fresh_inputs
from miniinfer_jax.models.decoder import forward, logits, param_specs
from miniinfer_jax.weights import load_params, read_model_config

LOGIT_TOLERANCE = 2e-4
LOGPROB_TOLERANCE = 1e-4
# Of transformers' own errors in half precision: the largest is one draw of many, the mean is steady.
MAX_ERROR_RATIO = 1.5
MEAN_ERROR_RATIO = 1.2
PAGE_SIZE = 16


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory):
    """(folder of the checkpoint, Expected) of "live:<case>" or "golden:<case>"."""
    source, name = request.param.split(":")
    folder = tmp_path_factory.mktemp(name)
    if source == "golden":
        expected = load_expected(GOLDENS / f"{name}.npz")
        write_checkpoint(folder, expected)
        return folder, expected
    pytest.importorskip("torch")
    from make_goldens import ask_transformers

    return folder, ask_transformers(CASES[name], folder)


GOLDEN_SOURCES = [f"golden:{name}" for name in GOLDEN_CASES]
LIVE_SOURCES = [f"live:{name}" for name in CASES]


def forward_logits(folder, expected: Expected, dtype: str) -> np.ndarray:
    """Logits [r, V] of the rows that `expected` keeps, by the forward pass alone."""
    config = read_model_config(folder)
    params = load_params(folder, config, param_specs(config, dtype))
    inputs = fresh_inputs(jnp.asarray(expected.tokens)[None], PAGE_SIZE)
    cache = kv_cache.create(config, inputs.page_table.size, PAGE_SIZE, dtype)

    @jax.jit
    def run(params, cache, inputs):
        hidden, _ = forward(config, params, cache, inputs)
        return logits(params, hidden[expected.rows])

    return np.asarray(run(params, cache, inputs))


@pytest.mark.parametrize("answers", GOLDEN_SOURCES + LIVE_SOURCES, indirect=True)
def test_logits(answers):
    folder, expected = answers
    found = forward_logits(folder, expected, "float32")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.logits, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("answers", [f"live:{name}" for name in HALF_CASES] + GOLDEN_SOURCES[:2], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_within_the_spread_of_transformers(answers, dtype):
    """Both are measured against transformers in float32; the weights are exact in every dtype."""
    folder, expected = answers
    errors = np.abs(forward_logits(folder, expected, dtype) - expected.logits)
    their_max, their_mean = expected.half_errors[dtype]
    print(f"{dtype}: max {errors.max() / their_max:.2f}, mean {errors.mean() / their_mean:.2f} of transformers' own")
    assert errors.max() <= MAX_ERROR_RATIO * their_max
    assert errors.mean() <= MEAN_ERROR_RATIO * their_mean


@pytest.mark.parametrize("answers", GOLDEN_SOURCES, indirect=True)
def test_engine(answers):
    """Chunked prefill and batched decode, each a program of its own."""
    check_engine(*answers, deterministic=False)


@pytest.mark.parametrize("answers", [s for s in LIVE_SOURCES if s[5:] not in GOLDEN_CASES], indirect=True)
def test_deterministic_engine(answers):
    """Prefill and decode as one program, which takes a third of the time to compile."""
    check_engine(*answers, deterministic=True)


def check_engine(folder, expected: Expected, deterministic: bool) -> None:
    """Greedy tokens, their log-probabilities, and those of a prompt, through `LLM`."""
    max_model_len = len(expected.tokens) + NUM_GREEDY
    llm = LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        max_num_seqs=2,
        max_num_batched_tokens=16,  # few programs to compile, and many chunks
        page_size=PAGE_SIZE,
        num_pages=2 * -(-max_model_len // PAGE_SIZE),
        deterministic=deterministic,
        use_tqdm=False,
    )
    greedy = SamplingParams(temperature=0, max_tokens=NUM_GREEDY, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate(expected.prompts, greedy, use_tqdm=False)
    for output, ids, logprobs in zip(outputs, expected.greedy_ids, expected.greedy_logprobs, strict=True):
        (completion,) = output.outputs
        assert completion.token_ids == ids.tolist()
        found = [entry[token_id].logprob for entry, token_id in zip(completion.logprobs, ids.tolist(), strict=True)]
        np.testing.assert_allclose(found, logprobs, rtol=0, atol=LOGPROB_TOLERANCE)

    (score,) = llm.score([expected.prompts[0]], use_tqdm=False)
    assert score.logprobs[0] is None
    np.testing.assert_allclose(score.logprobs[1:], expected.prompt_logprobs, rtol=0, atol=LOGPROB_TOLERANCE)


def test_goldens_are_of_these_cases_and_small():
    assert sorted(path.stem for path in GOLDENS.glob("*.npz")) == sorted(GOLDEN_CASES)
    assert sum(path.stat().st_size for path in GOLDENS.iterdir()) < 300_000
