"""What a user asks of one request: `SamplingParams`, checked when it is made. Standard library only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MAX_SEED = 2**32 - 1


class SamplingParamsError(ValueError):
    """A sampling parameter outside its range, or two that contradict each other."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SamplingParamsError(message)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        bad_words = (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words or ())
        object.__setattr__(self, "bad_words", bad_words)
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", self._parsed_logit_bias())

    def _parsed_logit_bias(self) -> dict[int, float]:
        """JSON has only string keys, so '12' is accepted for 12."""
        assert self.logit_bias is not None
        parsed = {}
        for token_id, bias in self.logit_bias.items():
            is_text = isinstance(token_id, str) and token_id.isascii() and token_id.isdigit()
            key = int(token_id) if is_text else token_id
            _require(_is_integer(key), f"logit_bias has the key {token_id!r}; keys are token ids")
            _require(_is_finite(bias), f"logit_bias[{key}] is {bias!r}; it must be a finite number")
            parsed[key] = float(bias)
        return parsed

    def _check_ranges(self) -> None:
        ranges = (
            ("temperature", 0.0, math.inf, "0 is greedy"),
            ("top_p", 0.0, 1.0, "1 keeps every token"),
            ("min_p", 0.0, 1.0, "0 turns it off"),
            ("presence_penalty", -2.0, 2.0, "0 turns it off"),
            ("frequency_penalty", -2.0, 2.0, "0 turns it off"),
            ("repetition_penalty", 0.0, math.inf, "1 turns it off"),
        )
        for name, low, high, hint in ranges:
            value = getattr(self, name)
            is_inside = _is_finite(value) and low <= value <= high
            _require(is_inside, f"{name} is {value!r}; it must be a finite number in [{low}, {high}] ({hint})")
        _require(self.top_p > 0, "top_p is 0; it must be above 0 (1 keeps every token)")
        _require(self.repetition_penalty > 0, "repetition_penalty is 0; it must be above 0 (1 turns it off)")
        integers = (("n", 1), ("top_k", -1), ("min_tokens", 0))
        for name, low in integers:
            value = getattr(self, name)
            _require(_is_integer(value) and value >= low, f"{name} is {value!r}; it must be an integer >= {low}")
        optional_integers = (("max_tokens", 1, math.inf), ("logprobs", 0, math.inf), ("prompt_logprobs", 0, math.inf))
        for name, low, high in (*optional_integers, ("seed", 0, MAX_SEED)):
            value = getattr(self, name)
            is_inside = value is None or (_is_integer(value) and low <= value <= high)
            limit = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
            _require(is_inside, f"{name} is {value!r}; it must be None or an integer {limit}")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} is {value!r}; it must be True or False")

    def _check_lists(self) -> None:
        for text in self.stop_strings:
            _require(isinstance(text, str) and text != "", f"stop holds {text!r}; a stop string must not be empty")
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

    @property
    def uses_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
