"""SamplingParams: ranges and contradictions are refused by name and value; lists come out as tuples."""

import dataclasses
import math

import pytest

from miniinfer_jax import SamplingParams
from miniinfer_jax.sampling_params import MAX_SEED, SamplingParamsError

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def test_defaults_draw_from_the_model_itself():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.n, params.seed, params.uses_penalties) == (16, 1, None, False)
    assert (params.stop_strings, params.stop_token_ids, params.bad_words) == ((), (), ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


def test_errors_are_value_errors():
    assert issubclass(SamplingParamsError, ValueError)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, True])
def test_numbers_are_finite(name, value):
    with pytest.raises(SamplingParamsError, match=f"{name} is {value!r}; it must be a finite number"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "outside", "inside"),
    [
        ("temperature", [-0.01], [0, 0.0, 5]),
        ("top_p", [-0.1, 0.0, 1.01], [1e-6, 1]),
        ("min_p", [-0.1, 1.01], [0, 1]),
        ("presence_penalty", [-2.01, 2.01], [-2, 2]),
        ("frequency_penalty", [-2.01, 2.01], [-2, 2]),
        ("repetition_penalty", [-1.0, 0.0], [0.1, 3]),
        ("n", [0, -1, 1.0, True, None], [1, 8]),
        ("top_k", [-2, 1.5, None], [-1, 0, 50]),
        ("min_tokens", [-1, 0.5, None], [0, 16]),
        ("max_tokens", [0, -1, 1.0, True], [1, None]),
        ("logprobs", [-1, 1.0, True], [0, 20, None]),
        ("prompt_logprobs", [-1, 1.0, True], [0, 20, None]),
        ("seed", [-1, MAX_SEED + 1, 1.0, True], [0, MAX_SEED, None]),
        ("ignore_eos", [1, None, "yes"], [True]),
        ("include_stop_str_in_output", [1, None], [True]),
        ("skip_special_tokens", [0, None], [False]),
        ("detokenize", [0, None], [False]),
    ],
)
def test_ranges(name, outside, inside):
    for value in inside:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(SamplingParamsError, match=f"{name} is "):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop": ""}, "a stop string must not be empty"),
        ({"stop": ["ok", ""]}, "a stop string must not be empty"),
        ({"stop": [3]}, "stop holds 3"),
        ({"bad_words": ["  "]}, "a bad word must not be empty"),
        ({"bad_words": [3]}, "bad_words holds 3"),
        ({"stop_token_ids": ["3"]}, "stop_token_ids holds '3'; token ids are integers"),
        ({"stop_token_ids": [True]}, "stop_token_ids holds True"),
        ({"allowed_token_ids": [1.0]}, "allowed_token_ids holds 1.0"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty; no token could ever be drawn"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias has the key 'a'; keys are token ids"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias has the key '-1'"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\] is inf; it must be a finite number"),
        ({"min_tokens": 4, "max_tokens": 3}, r"min_tokens \(4\) is above max_tokens \(3\)"),
        ({"n": 2, "temperature": 0}, "all samples would be the same; use n=1"),
        ({"stop": "x", "detokenize": False}, "stop strings need text: drop detokenize=False, or use stop_token_ids"),
    ],
)
def test_lists_and_contradictions(values, message):
    with pytest.raises(SamplingParamsError, match=message):
        SamplingParams(**values)


def test_lists_become_tuples_and_one_string_a_tuple_of_one():
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2], bad_words="c", allowed_token_ids=[3])
    assert (params.stop, params.stop_strings) == (("a", "b"), ("a", "b"))
    assert (params.stop_token_ids, params.bad_words, params.allowed_token_ids) == ((1, 2), ("c",), (3,))
    assert SamplingParams(stop="end").stop_strings == ("end",)


def test_logit_bias_takes_the_keys_that_json_has():
    assert SamplingParams(logit_bias={"12": 1, 3: -2.5}).logit_bias == {12: 1.0, 3: -2.5}


@pytest.mark.parametrize("change", [{"presence_penalty": 0.1}, {"frequency_penalty": -1}, {"repetition_penalty": 1.1}])
def test_any_penalty_counts_as_one(change):
    assert SamplingParams(**change).uses_penalties


def test_from_dict_names_what_it_does_not_know():
    assert SamplingParams.from_dict({"temperature": 0, "max_tokens": 3}) == SamplingParams(temperature=0, max_tokens=3)
    with pytest.raises(
        SamplingParamsError, match="unsupported sampling parameter: best_of, use_beam_search; known: n,"
    ):
        SamplingParams.from_dict({"use_beam_search": True, "best_of": 2, "n": 1})


def test_a_copy_with_another_value_is_checked_too():
    params = SamplingParams(stop="end", logit_bias={1: 1.0})
    assert dataclasses.replace(params, n=2).stop_strings == ("end",)
    with pytest.raises(SamplingParamsError, match="n is 0"):
        dataclasses.replace(params, n=0)


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 2**31},
        {"min_tokens": 2**31, "max_tokens": None},
        {"temperature": 1e39},
        {"temperature": 10**400},
        {"repetition_penalty": 1e-50},
        {"logit_bias": {5: 1e39}},
        {"logit_bias": [5]},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"allowed_token_ids": 5},
        {"bad_words": 5},
        {"max_tokens": 2**40},
    ],
)
def test_what_the_device_cannot_count_or_that_is_no_list_is_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)
