"""What a user asks of one request: `SamplingParams`, checked when it is made. Standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real  # numpy's numbers are of these kinds too
from typing import Any

MAX_SEED = 2**32 - 1
MAX_INTEGER = 2**31 - 1  # the device counts in int32
MAX_NUMBER = 1e30  # and computes in float32, with room for a few operations


class SamplingParamsError(ValueError):
    """A sampling parameter outside its range, or two that contradict each other."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SamplingParamsError(message)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and abs(value) <= MAX_NUMBER  # pyright: ignore[reportArgumentType, reportOperatorIssue]


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    is_list = isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes)
    _require(is_list, f"{name} is {value!r}; it must be a list")
    return tuple(value)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt; names and meanings are vLLM's, ranges are checked here, token ids by the engine.

    temperature 0 is greedy; top_k 0 or -1 and top_p 1 keep every token; logprobs=k returns the k likeliest
    tokens beside the chosen one (of the model's own distribution, before any transform). A request with a
    seed draws with `fold_in(key(seed), position)`; of n > 1, sample i uses seed + i.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """The parameters that `values` names; an unknown name is an error that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        _require(not unknown, f"unsupported sampling parameter: {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)

    def __post_init__(self) -> None:
        self._normalize()
        self._check_ranges()
        self._check_lists()
        self._check_conflicts()

    def _normalize(self) -> None:
        """Lists become tuples, and one stop string becomes a tuple of one."""
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            if value is None:
                value = None if name == "allowed_token_ids" else ()
            elif isinstance(value, str) and name in ("stop", "bad_words"):
                value = (value,)
            else:
                value = _as_tuple(name, value)
            object.__setattr__(self, name, value)
        if self.logit_bias is not None:
            _require(isinstance(self.logit_bias, Mapping), f"logit_bias is {self.logit_bias!r}; it must be a mapping")
            object.__setattr__(self, "logit_bias", self._parsed_logit_bias())

    def _parsed_logit_bias(self) -> dict[int, float]:
        """JSON has only string keys, so '12' is accepted for 12."""
        assert self.logit_bias is not None
        parsed = {}
        for token_id, bias in self.logit_bias.items():
            is_text = isinstance(token_id, str) and token_id.isascii() and token_id.isdigit()
            key = int(token_id) if is_text else token_id
            _require(_is_integer(key), f"logit_bias has the key {token_id!r}; keys are token ids")
            _require(
                _is_finite(bias), f"logit_bias[{key}] is {bias!r}; it must be a finite number within {MAX_NUMBER:g}"
            )
            parsed[key] = float(bias)
        return parsed

    def _check_ranges(self) -> None:
        ranges = (
            ("temperature", 0.0, MAX_NUMBER, "0 is greedy"),
            ("top_p", 0.0, 1.0, "1 keeps every token"),
            ("min_p", 0.0, 1.0, "0 turns it off"),
            ("presence_penalty", -2.0, 2.0, "0 turns it off"),
            ("frequency_penalty", -2.0, 2.0, "0 turns it off"),
            ("repetition_penalty", 0.01, 100.0, "1 turns it off"),
        )
        for name, low, high, hint in ranges:
            value = getattr(self, name)
            is_inside = _is_finite(value) and low <= value <= high
            _require(is_inside, f"{name} is {value!r}; it must be a finite number in [{low}, {high}] ({hint})")
        _require(self.top_p > 0, "top_p is 0; it must be above 0 (1 keeps every token)")
        integers = (("n", 1), ("top_k", -1), ("min_tokens", 0))
        for name, low in integers:
            value = getattr(self, name)
            is_inside = _is_integer(value) and low <= value <= MAX_INTEGER
            _require(is_inside, f"{name} is {value!r}; it must be an integer in [{low}, {MAX_INTEGER}]")
        optional_integers = (
            ("max_tokens", 1, MAX_INTEGER),
            ("logprobs", 0, MAX_INTEGER),
            ("prompt_logprobs", 0, MAX_INTEGER),
        )
        for name, low, high in (*optional_integers, ("seed", 0, MAX_SEED)):
            value = getattr(self, name)
            is_inside = value is None or (_is_integer(value) and low <= value <= high)
            _require(is_inside, f"{name} is {value!r}; it must be None or an integer in [{low}, {high}]")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} is {value!r}; it must be True or False")

    def _check_lists(self) -> None:
        for text in self.stop_strings:
            _require(isinstance(text, str), f"stop holds {text!r}; stop strings are texts")
            _require(text != "", "stop holds an empty text; a stop string must not be empty")
        for text in self.bad_words or ():
            is_word = isinstance(text, str) and text.strip() != ""
            _require(is_word, f"bad_words holds {text!r}; a bad word must not be empty")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                _require(_is_integer(token_id), f"{name} holds {token_id!r}; token ids are integers")
        _require(self.allowed_token_ids != (), "allowed_token_ids is empty; no token could ever be drawn")

    def _check_conflicts(self) -> None:
        has_room = self.max_tokens is None or self.min_tokens <= self.max_tokens
        _require(has_room, f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        greedy_many = self.n > 1 and self.temperature == 0
        _require(not greedy_many, f"n is {self.n} with temperature 0: all samples would be the same; use n=1")
        _require(
            not (self.stop_strings and not self.detokenize),
            "stop strings need text: drop detokenize=False, or use stop_token_ids",
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop

    @cached_property
    def is_plain(self) -> bool:
        """Whether nothing but a temperature is asked for: tokens are drawn without transforms or scores."""
        is_scored = self.logprobs is not None or self.prompt_logprobs is not None
        is_cut = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return not is_scored and not is_cut and not self.uses_token_rules

    @cached_property
    def uses_token_rules(self) -> bool:
        """Whether anything is said about single tokens of the vocabulary."""
        has_lists = bool(self.logit_bias or self.bad_words) or self.allowed_token_ids is not None
        return self.uses_penalties or has_lists or self.min_tokens > 0

    @property
    def uses_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
