"""What a request must satisfy on this engine, checked before it is queued and before any device work."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from miniinfer_jax.batch import MAX_BAD_WORD_LEN, MAX_BAD_WORDS, MAX_LOGPROBS
from miniinfer_jax.sampling_params import MAX_SEED, SamplingParams
from miniinfer_jax.sequence import Sequence


class RequestError(ValueError):
    """A request that this engine cannot serve; says what, the limit and the remedy."""


class EngineAsleep(ValueError):
    """A call that needs the device, which a sleeping engine has given back."""


def check_prompt(prompt_token_ids: list[int], vocab_size: int, max_model_len: int, remedy: str) -> None:
    """Raises RequestError for an empty prompt, one without room for an output (with `remedy`), or unknown ids."""
    if not prompt_token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    if len(prompt_token_ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(prompt_token_ids)} tokens and max_model_len is {max_model_len}, prompt and output "
            f"together: shorten the prompt, or {remedy}"
        )
    check_ids("the prompt", prompt_token_ids, vocab_size)


def check_cache_salt(cache_salt: Any) -> None:
    """Raises RequestError for a salt that is no text, or an empty one."""
    if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
        raise RequestError(f"cache_salt is {cache_salt!r:.80}; it must be a text that is not empty, or be left out")


def check_seed(seed: Any) -> None:
    """Raises RequestError for a seed that the device cannot hold."""
    if seed is not None and (
        not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) <= MAX_SEED
    ):
        raise RequestError(f"seed is {seed!r}; it must be None or an integer in [0, {MAX_SEED}]")


def check_params(params: SamplingParams, vocab_size: int, has_tokenizer: bool) -> None:
    """Raises RequestError for parameters that are fine in themselves but not with this model or engine."""
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_ids(name, getattr(params, name) or (), vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and value > MAX_LOGPROBS:
            raise RequestError(f"{name} is {value}, above the limit of {MAX_LOGPROBS}")
    if not has_tokenizer:
        for name, is_used in (("stop", bool(params.stop_strings)), ("bad_words", bool(params.bad_words))):
            if is_used:
                raise RequestError(f"{name} needs a tokenizer, and this model was loaded without one")


def check_scheduling(priority: int, tenant: str, expected_output_len: int | None) -> None:
    """Raises RequestError for what no scheduling policy could read."""
    if not _is_integer(priority):
        raise RequestError(f"priority is {priority!r}; it must be an integer, a smaller one is more urgent")
    if not isinstance(tenant, str):
        raise RequestError(f"tenant is {tenant!r}; it must be a string")
    if expected_output_len is not None and not (_is_integer(expected_output_len) and expected_output_len > 0):
        raise RequestError(f"expected_output_len is {expected_output_len!r}; it must be a positive integer, or None")


def encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text. Raises RequestError for one that has no UTF-8, such as a lone surrogate."""
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except Exception as error:  # the Rust tokenizers raise TypeError, and Exception itself
        raise RequestError(f"the text {text!r:.80} cannot be tokenized: {error}") from error


def check_something_allowed(sequence: Sequence) -> None:
    """Raises RequestError where allowed_token_ids, bad_words and min_tokens together leave no token to draw."""
    allowed = sequence.params.allowed_token_ids
    if allowed is None:
        return
    left = set(allowed) - {word[0] for word in sequence.bad_words if len(word) == 1}
    if not left:
        raise RequestError(f"bad_words forbid all of allowed_token_ids {str(allowed):.80}: drop one of the two")
    if sequence.params.min_tokens and not left - set(sequence.stop_token_ids):
        raise RequestError(
            f"min_tokens is {sequence.params.min_tokens}, and each of allowed_token_ids {str(allowed):.80} "
            "ends the sequence: drop one of the two"
        )


def check_rewind(request_id: str, sequences: list[Sequence], num_tokens: int, seed: int | None) -> None:
    """Raises RequestError unless each of a request's sequences goes on and has num_tokens outputs to take back."""
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 0:
        raise RequestError(f"num_tokens is {num_tokens!r}; it must be an integer, 0 or more")
    check_seed(seed)
    if any(sequence.is_finished for sequence in sequences):
        raise RequestError(f"a sequence of request {request_id!r} has ended: rewind a request while all of it runs")
    num_drawn = min(len(sequence.output_token_ids) for sequence in sequences)
    if num_tokens > num_drawn:
        raise RequestError(
            f"request {request_id!r} has drawn {num_drawn} tokens, and taking back {num_tokens} would go past its "
            f"prompt: rewind by {num_drawn} at most"
        )


def bad_word_ids(params: SamplingParams, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell each bad word, at the start of a text and after a space.

    Raises RequestError where there are more, or longer ones, than the device keeps for a request.
    """
    words: dict[tuple[int, ...], None] = {}
    for text in params.bad_words or ():
        for spelling in (text.lstrip(), " " + text.lstrip()):
            words[tuple(encode(tokenizer, spelling, add_special_tokens=False))] = None
    for word in words:
        if len(word) > MAX_BAD_WORD_LEN:
            raise RequestError(f"a bad word spells {len(word)} tokens, the limit is {MAX_BAD_WORD_LEN}: shorten it")
    num_long = sum(len(word) > 1 for word in words)
    if num_long > MAX_BAD_WORDS:
        raise RequestError(
            f"bad_words spell {num_long} sequences of several tokens, the limit is {MAX_BAD_WORDS}: give fewer"
        )
    return tuple(words)


def check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises RequestError for an id that the vocabulary does not have."""
    for token_id in token_ids:
        if not _is_integer(token_id) or not 0 <= token_id < vocab_size:
            raise RequestError(f"{name} holds the token id {token_id!r}; the vocabulary is 0 to {vocab_size - 1}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
