"""Lines of a batch file, understood and answered, without an engine."""

import json

import pytest

from miniinfer_jax.batch_lines import CHAT_URL, COMPLETIONS_URL, BatchLineError, error_line, parse_line, result_line
from miniinfer_jax.outputs import CompletionOutput, Logprob, RequestOutput


def openai_line(url: str, body: dict, **more) -> str:
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body, **more})


def finished(error: str | None = None) -> RequestOutput:
    logprobs = [{5: Logprob(-0.5, 1, "x"), 6: Logprob(-1.5, 2, "y")}]
    completion = CompletionOutput(0, "x", [5], -0.5, logprobs, "stop", None)
    return RequestOutput("batch-1", "p", [1, 2], [completion], finished=True, error=error)


def test_own_form_takes_each_kind_of_prompt():
    assert parse_line('{"prompt": "hi", "temperature": 0, "max_tokens": 3}', {}).params.max_tokens == 3
    assert parse_line('{"prompt_token_ids": [1, 2], "custom_id": "c"}', {}).custom_id == "c"
    messages = [{"role": "user", "content": "hi"}]
    assert parse_line(json.dumps({"messages": messages}), {}).messages == messages


def test_a_salt_rides_beside_the_prompt():
    assert parse_line('{"prompt": "hi", "cache_salt": "tenant"}', {}).cache_salt == "tenant"
    assert parse_line(openai_line(COMPLETIONS_URL, {"prompt": "hi", "cache_salt": "t"}), {}).cache_salt == "t"
    assert parse_line('{"prompt": "hi"}', {}).cache_salt is None


def test_a_line_goes_before_the_defaults():
    request = parse_line('{"prompt": "hi", "top_p": 0.5}', {"top_p": 0.9, "max_tokens": 7})
    assert (request.params.top_p, request.params.max_tokens) == (0.5, 7)


def test_openai_forms():
    body = {"model": "any", "prompt": "hi", "max_tokens": 4, "logprobs": 2, "user": "u", "seed": None}
    request = parse_line(openai_line(COMPLETIONS_URL, body), {})
    assert (request.prompt, request.params.logprobs, request.url) == ("hi", 2, COMPLETIONS_URL)
    assert parse_line(openai_line(COMPLETIONS_URL, {"prompt": [3, 4]}), {}).prompt_token_ids == [3, 4]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 5}
    request = parse_line(openai_line(CHAT_URL, {**chat, "logprobs": True, "top_logprobs": 3}), {})
    assert (request.params.max_tokens, request.params.logprobs) == (5, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "JSON object"),
        ("{}", "found none"),
        ('{"prompt": "a", "messages": []}', "found prompt, messages"),
        ('{"prompt": ["a"]}', "one text"),
        ('{"prompt_token_ids": [1, "a"]}', "list of integers"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": "hi"}', "role and content"),
        ('{"prompt": "a", "temprature": 1}', "temprature"),
        ('{"prompt": "a", "temperature": -1}', "temperature is -1"),
        ('{"prompt": "a", "stop": 5}', "stop is 5"),
        ('{"prompt": "a", "logit_bias": [5]}', "logit_bias"),
        ('{"prompt": "a", "top_k": 5000000000}', "top_k"),
        ('{"prompt": "a", "custom_id": 5}', "custom_id is 5"),
        (openai_line("/v1/embeddings", {"input": "a"}), "/v1/embeddings"),
        (openai_line(COMPLETIONS_URL, {"prompt": "a"}, method="GET"), "GET"),
        (openai_line(COMPLETIONS_URL, {"prompt": "a", "stream": True}), "stream"),
        (openai_line(CHAT_URL, {"messages": [], "tools": [{}]}), "tools"),
        (openai_line(CHAT_URL, {"prompt": "a"}), "no messages"),
        (openai_line(CHAT_URL, {"messages": [{"role": "user", "content": ""}], "top_logprobs": 1}), "logprobs: true"),
    ],
)
def test_a_bad_line_says_what_is_wrong(line, message):
    with pytest.raises(BatchLineError, match=message):
        parse_line(line, {})


def test_a_bad_openai_line_is_answered_in_kind():
    with pytest.raises(BatchLineError) as caught:
        parse_line(openai_line(CHAT_URL, {"messages": []}), {})
    error = caught.value
    answer = error_line(error, error.custom_id, error.url, "batch-1")
    assert answer["custom_id"] == "a" and answer["error"] is None
    assert answer["response"]["status_code"] == 400
    assert "role and content" in answer["response"]["body"]["error"]["message"]


def test_results_in_each_form():
    own = result_line(parse_line('{"prompt": "p", "custom_id": "c"}', {}), finished(), "batch-1", "m")
    assert own["custom_id"] == "c" and own["error"] is None and own["outputs"][0]["text"] == "x"
    assert own["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}

    text = result_line(parse_line(openai_line(COMPLETIONS_URL, {"prompt": "p"}), {}), finished(), "batch-1", "m")
    choice = text["response"]["body"]["choices"][0]
    assert (text["response"]["status_code"], choice["text"], choice["finish_reason"]) == (200, "x", "stop")
    assert choice["logprobs"]["top_logprobs"] == [{"x": -0.5, "y": -1.5}]
    assert choice["logprobs"]["text_offset"] == [0]

    messages = {"messages": [{"role": "user", "content": "p"}]}
    chat = result_line(parse_line(openai_line(CHAT_URL, messages), {}), finished(), "batch-1", "m")
    choice = chat["response"]["body"]["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "x"}
    assert choice["logprobs"]["content"][0]["bytes"] == [ord("x")]
    json.dumps([own, text, chat])


def test_a_request_that_the_engine_ended_in_error():
    own = result_line(parse_line('{"prompt": "p"}', {}), finished("NaN"), "batch-1", "m")
    assert own == {"outputs": [], "error": {"message": "NaN", "type": "server_error"}}
    openai = result_line(parse_line(openai_line(COMPLETIONS_URL, {"prompt": "p"}), {}), finished("NaN"), "batch-1", "m")
    assert openai["response"]["status_code"] == 500
