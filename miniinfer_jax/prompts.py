"""What users call a prompt, and what belongs to it, in the forms that the engine takes."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from miniinfer_jax.engine.validation import RequestError, check_scheduling, encode
from miniinfer_jax.sampling_params import SamplingParams

Prompt = str | Mapping[str, Any] | Sequence[int]
Message = Mapping[str, Any]
PROMPT_TYPES = {"prompt": str, "prompt_token_ids": Sequence, "messages": Sequence}


class TokenizedPrompt(NamedTuple):
    """A prompt in any of its forms, as the engine takes it."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None


def apply_chat_template(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation, ready for the assistant's turn. Raises ValueError without a template."""
    if tokenizer is None or not tokenizer.chat_template:
        raise RequestError("chat needs a tokenizer with a chat template, which this model lacks: use generate()")
    conversation: Any = list(messages)
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: on odd messages it raises whatever it likes
        raise RequestError(f"the chat template cannot render these messages: {error}") from error
    return encode(tokenizer, str(text), add_special_tokens=False)


def tokenize(tokenizer: Any, prompt: Prompt) -> TokenizedPrompt:
    """A prompt as token ids. Raises RequestError for what is none, and for text without a tokenizer."""
    if isinstance(prompt, Mapping):
        cache_salt = prompt.get("cache_salt")
        keys = [key for key in prompt if key != "cache_salt"]
        key = keys[0] if len(keys) == 1 else None
        if key not in PROMPT_TYPES:
            raise RequestError(
                f"a prompt has exactly one of {', '.join(PROMPT_TYPES)}, and a cache_salt if wanted; "
                f"this one has {sorted(prompt)}"
            )
        value = prompt[key]
        is_text = isinstance(value, str)
        if is_text != (key == "prompt") or not isinstance(value, PROMPT_TYPES[key]):
            raise RequestError(f"{key} holds {value!r:.80}; it must be a {'text' if key == 'prompt' else 'list'}")
        if key == "messages":
            return TokenizedPrompt(None, apply_chat_template(tokenizer, value), cache_salt)
        return tokenize(tokenizer, value)._replace(cache_salt=cache_salt)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("this model was loaded without a tokenizer: give prompt_token_ids")
        return TokenizedPrompt(prompt, encode(tokenizer, prompt))
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise RequestError(f"a prompt is a text, a mapping or a list of token ids, not {type(prompt).__name__}")
    # numpy's integers become Python's; a bool stays one, and is refused with the other ids.
    token_ids = [int(token) if isinstance(token, Integral) and type(token) is not bool else token for token in prompt]
    return TokenizedPrompt(None, token_ids)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    prompts = getattr(prompts, "tolist", lambda: prompts)()  # a numpy array of token ids
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(f"prompts is a {type(prompts).__name__}; give a prompt, or a list of prompts")
    several: Any = list(prompts)
    return [several] if several and isinstance(several[0], Integral) else several


def params_for(prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    """By prompt, its parameters. Raises RequestError for anything else than one for all, or one a prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise RequestError("sampling_params must be a SamplingParams, or a list of them, one a prompt")
    if len(params) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts but {len(params)} sampling_params: give one, or one a prompt")
    return list(params)


def scheduling_for(
    num_prompts: int,
    priority: int | Sequence[int],
    tenant: str | Sequence[str],
    expected_output_len: int | Sequence[int | None] | None,
) -> list[dict[str, Any]]:
    """By prompt, what `add_request` takes for the scheduling policy. Raises RequestError for what it would refuse."""
    given = {"priority": priority, "tenant": tenant, "expected_output_len": expected_output_len}
    columns = []
    for name, value in given.items():
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        column = list(value) if is_list else [value] * num_prompts
        if len(column) != num_prompts:
            raise RequestError(f"{num_prompts} prompts but {len(column)} of {name}: give one, or one a prompt")
        columns.append(column)
    rows = [dict(zip(given, row, strict=True)) for row in zip(*columns, strict=True)]
    for row in rows:
        check_scheduling(**row)
    return rows
