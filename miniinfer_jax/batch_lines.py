"""One line of a batch file each way: JSON -> `BatchRequest`, finished output -> JSON. No files, no engine.

Two forms of line are read, and answered in kind:

- MiniInfer's: {"prompt": text} or {"prompt_token_ids": [...]} or {"messages": [...]}, beside it the sampling
  parameters by name, and a "custom_id" and a "cache_salt" if wanted.
- OpenAI's batch form: {"custom_id", "method": "POST", "url": "/v1/completions" or "/v1/chat/completions", "body"}.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from miniinfer_jax.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput
from miniinfer_jax.sampling_params import SamplingParams

COMPLETIONS_URL = "/v1/completions"
CHAT_URL = "/v1/chat/completions"
PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")

# What a body may say that asks for what is done anyway; any other value of these asks for what is not there.
_ONLY_VALUES = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
}
# Who asks and for what: nothing here changes the answer. The run's model answers, whatever name a line gives.
_LABELS = ("model", "user", "metadata", "store", "service_tier")


class BatchLineError(ValueError):
    """A line that is no request; `custom_id` and `url` where the line got far enough to give them."""

    def __init__(self, message: str, custom_id: str | None = None, url: str | None = None):
        super().__init__(message)
        self.custom_id = custom_id
        self.url = url


@dataclass(frozen=True)
class BatchRequest:
    """One line understood: exactly one of the three prompts is there. `url` is None for MiniInfer's own form."""

    params: SamplingParams
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    cache_salt: str | None = None
    custom_id: str | None = None
    url: str | None = None


def parse_line(line: str, defaults: Mapping[str, Any]) -> BatchRequest:
    """The request of one line; sampling parameters that it does not name are taken from `defaults`.

    Raises BatchLineError.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BatchLineError(f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BatchLineError(f"a request is a JSON object, not a {type(values).__name__}")
    custom_id = values.pop("custom_id", None)
    if custom_id is not None and not isinstance(custom_id, str):
        raise BatchLineError(f"custom_id is {custom_id!r}; it must be a string")
    url = values.get("url") if "body" in values else None
    try:
        if "body" in values:
            return _from_openai(values, custom_id, defaults)
        return _from_own(values, custom_id, None, defaults)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise BatchLineError(str(error), custom_id, url) from None


def _from_own(
    values: dict[str, Any], custom_id: str | None, url: str | None, defaults: Mapping[str, Any]
) -> BatchRequest:
    prompts = {key: values.pop(key) for key in PROMPT_KEYS if key in values}
    if len(prompts) != 1:
        raise ValueError(f"a request has one of {', '.join(PROMPT_KEYS)}; found {', '.join(prompts) or 'none'}")
    _check_prompt(*next(iter(prompts.items())))
    cache_salt = values.pop("cache_salt", None)
    params = SamplingParams.from_dict({**defaults, **values})
    return BatchRequest(params=params, cache_salt=cache_salt, custom_id=custom_id, url=url, **prompts)


def _check_prompt(key: str, value: Any) -> None:
    if key == "prompt" and not isinstance(value, str):
        raise ValueError(f"prompt is a {type(value).__name__}; it must be one text (one request a line)")
    if key == "prompt_token_ids":
        is_ids = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
        if not is_ids:
            raise ValueError("prompt_token_ids must be a list of integers")
    if key == "messages":
        is_message = [isinstance(m, dict) and "role" in m and "content" in m for m in value] if value else []
        if not isinstance(value, list) or not is_message or not all(is_message):
            raise ValueError("messages must be a list of objects with role and content, at least one")


def _from_openai(values: dict[str, Any], custom_id: str | None, defaults: Mapping[str, Any]) -> BatchRequest:
    url, method, body = values.get("url"), values.get("method", "POST"), values["body"]
    if url not in (COMPLETIONS_URL, CHAT_URL):
        raise ValueError(f"url is {url!r}; use {COMPLETIONS_URL} or {CHAT_URL}")
    if method != "POST":
        raise ValueError(f"method is {method!r}; it must be POST")
    if not isinstance(body, dict):
        raise ValueError("body must be a JSON object")
    # OpenAI's null is "as if left out"
    body = {key: value for key, value in body.items() if key not in _LABELS and value is not None}
    for key, allowed in _ONLY_VALUES.items():
        if key in body and body.pop(key) not in allowed:
            raise ValueError(f"{key} is not supported in a batch; leave it out")
    if url == CHAT_URL:
        _rename_chat_options(body)
        if "messages" not in body:
            raise ValueError("body has no messages")
        body["messages"] = _with_plain_content(body["messages"])
    elif isinstance(body.get("prompt"), list):
        is_one_text = len(body["prompt"]) == 1 and isinstance(body["prompt"][0], str)
        if is_one_text:
            body["prompt"] = body["prompt"][0]
        else:
            body["prompt_token_ids"] = body.pop("prompt")
    return _from_own(body, custom_id, url, defaults)


def _with_plain_content(messages: Any) -> Any:
    """Messages whose content is a list of text parts get the parts' text; the rest is checked later."""
    plain = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise ValueError("content has parts that are not text; this model reads text alone")
            message = {**message, "content": "".join(str(part.get("text", "")) for part in content)}
        plain.append(message)
    return plain if isinstance(messages, list) else messages


def _rename_chat_options(body: dict[str, Any]) -> None:
    """The chat form asks for log-probabilities in two fields, and has a newer name for max_tokens."""
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    wanted, count = body.pop("logprobs", False), body.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise ValueError(f"logprobs is {wanted!r}; in a chat request it is true or false, with top_logprobs")
    if count is not None and not wanted:
        raise ValueError("top_logprobs needs logprobs: true")
    if wanted:
        body["logprobs"] = count or 0


def error_line(error: Exception, custom_id: str | None, url: str | None, request_id: str) -> dict[str, Any]:
    """What is written for a line that could not be run: the user's fault (400)."""
    body = {"message": str(error), "type": "invalid_request_error"}
    return _failed(body, 400, custom_id, url, request_id)


def result_line(request: BatchRequest, output: RequestOutput, request_id: str, model: str) -> dict[str, Any]:
    """What is written for a finished request, in the form that its line had."""
    if output.error is not None:
        body = {"message": output.error, "type": "server_error"}
        return _failed(body, 500, request.custom_id, request.url, request_id)
    if request.url is None:
        line = {**_labelled(request.custom_id), "outputs": [asdict(completion) for completion in output.outputs]}
        if output.prompt_logprobs is not None:
            line["prompt_logprobs"] = [_plain_logprobs(position) for position in output.prompt_logprobs]
        return {**line, "usage": _usage(output), "error": None}
    return _openai_line(request.custom_id, request_id, 200, _openai_body(request.url, output, request_id, model))


def _failed(
    body: dict[str, Any], status: int, custom_id: str | None, url: str | None, request_id: str
) -> dict[str, Any]:
    if url is None:
        return {**_labelled(custom_id), "outputs": [], "error": body}
    return _openai_line(custom_id, request_id, status, {"error": {**body, "param": None, "code": None}})


def _labelled(custom_id: str | None) -> dict[str, Any]:
    return {} if custom_id is None else {"custom_id": custom_id}


def _plain_logprobs(position: PositionLogprobs | None) -> dict[int, dict[str, Any]] | None:
    return None if position is None else {token_id: asdict(logprob) for token_id, logprob in position.items()}


def _usage(output: RequestOutput) -> dict[str, int]:
    prompt_tokens = len(output.prompt_token_ids)
    completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _openai_line(custom_id: str | None, request_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"batch_req-{request_id}", "custom_id": custom_id, "response": response, "error": None}


def _openai_body(url: str, output: RequestOutput, request_id: str, model: str) -> dict[str, Any]:
    is_chat = url == CHAT_URL
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [(_chat_choice if is_chat else _text_choice)(completion) for completion in output.outputs],
        "usage": _usage(output),
    }


def _chosen(completion: CompletionOutput) -> list[tuple[Logprob, list[Logprob]]]:
    """For every token: its own log-probability, and the likeliest ones in order."""
    pairs = zip(completion.token_ids, completion.logprobs or [], strict=False)
    return [(tops[token], sorted(tops.values(), key=lambda top: -top.logprob)) for token, tops in pairs]


def _text_choice(completion: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        chosen = _chosen(completion)
        texts = [own.decoded_token or "" for own, _ in chosen]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [own.logprob for own, _ in chosen],
            "top_logprobs": [{top.decoded_token or "": top.logprob for top in tops} for _, tops in chosen],
            "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        }
    return {
        "index": completion.index,
        "text": completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


def _chat_choice(completion: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        content = [
            {**_chat_logprob(own), "top_logprobs": [_chat_logprob(top) for top in tops]}
            for own, tops in _chosen(completion)
        ]
        logprobs = {"content": content}
    return {
        "index": completion.index,
        "message": {"role": "assistant", "content": completion.text},
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


def _chat_logprob(logprob: Logprob) -> dict[str, Any]:
    text = logprob.decoded_token or ""
    return {"token": text, "logprob": logprob.logprob, "bytes": list(text.encode())}
