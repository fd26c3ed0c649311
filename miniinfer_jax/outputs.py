"""What a user gets back: `RequestOutput` and its parts, with vLLM's fields. Standard library only."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# One entry a position: token id -> Logprob. The first position of a prompt has no predecessor, hence None.
PositionLogprobs = dict[int, Logprob]
PromptLogprobs = list[PositionLogprobs | None]


@dataclass
class CompletionOutput:
    """One continuation. finish_reason: None while running, then "stop", "length", "abort" or "error".

    stop_reason is the stop string or stop token id that ended it, None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds on `time.monotonic`'s clock; None until it happened."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """The state of one request: its prompt and its n continuations so far. `error` says what made it fail."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: PromptLogprobs | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Score:
    """How likely a model finds given tokens: the natural logarithm of each one's probability after those before it.

    The first token has no predecessor, hence None. `error` says why a prompt among others could not be scored.
    """

    prompt_token_ids: list[int]
    logprobs: list[float | None]
    error: str | None = None

    @property
    def total(self) -> float:
        """The logarithm of the probability of all tokens after the first."""
        return sum(logprob for logprob in self.logprobs if logprob is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token; 1 for a prompt of one token."""
        return math.exp(-self.total / max(1, len(self.logprobs) - 1))


@dataclass(frozen=True)
class TextDelta:
    """One piece of a streamed continuation: what is new since the last delta of the same (prompt_index, index)."""

    prompt_index: int
    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
