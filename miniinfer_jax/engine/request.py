"""One request: its n sequences, their texts and log-probabilities, and the `RequestOutput` made of them."""

import time
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from miniinfer_jax.engine.detokenizer import Detokenizer
from miniinfer_jax.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
)
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence


def position_logprobs(
    logprobs: np.ndarray, token_ids: np.ndarray, rank: int, num_top: int, tokenizer: Any
) -> PositionLogprobs:
    """The chosen token's entry (index 0 of both arrays) and those of the num_top likeliest ones."""

    def text(token_id: int) -> str | None:
        return None if tokenizer is None else tokenizer.decode([token_id])

    entries = {int(token_ids[0]): Logprob(float(logprobs[0]), rank, text(int(token_ids[0])))}
    for place in range(1, num_top + 1):
        token_id = int(token_ids[place])
        if token_id >= 0:
            entries.setdefault(token_id, Logprob(float(logprobs[place]), place, text(token_id)))
    return entries


@dataclass(eq=False)
class Continuation:
    """One sequence of a request and what the user sees of it."""

    index: int
    sequence: Sequence
    detokenizer: Detokenizer | None
    logprobs: list[PositionLogprobs] | None
    cumulative_logprob: float = 0.0

    def forget(self, num_tokens: int) -> None:
        """Makes text and log-probabilities those of the sequence, which has lost its last num_tokens outputs."""
        sequence = self.sequence
        if self.detokenizer is not None:
            self.detokenizer = self.detokenizer.fork(sequence.output_token_ids)
        if self.logprobs is not None:
            del self.logprobs[len(self.logprobs) - num_tokens :]
            drawn = zip(self.logprobs, sequence.output_token_ids, strict=True)
            # Added one by one, as they came: sum() rounds otherwise from Python 3.12 on.
            self.cumulative_logprob = reduce(add, (entries[token_id].logprob for entries, token_id in drawn), 0.0)

    def fork(self, sequence_id: int, seed: int) -> "Continuation":
        """The same text so far, to be continued by a sequence of its own; one that has ended stays as it is."""
        if self.sequence.is_finished:
            return self
        detokenizer = None if self.detokenizer is None else self.detokenizer.fork(self.sequence.output_token_ids)
        logprobs = None if self.logprobs is None else list(self.logprobs)
        sequence = self.sequence.fork(sequence_id, seed)
        return Continuation(self.index, sequence, detokenizer, logprobs, self.cumulative_logprob)

    def output(self) -> CompletionOutput:
        """The continuation so far; text that may still become a stop string is held back while it runs."""
        sequence, text = self.sequence, ""
        if self.detokenizer is not None:
            text = self.detokenizer.text
            if not sequence.is_finished:
                text = text[: self.detokenizer.settled_len]
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=list(sequence.output_token_ids),
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )


@dataclass(eq=False)
class Request:
    """What was asked and how far it is. `streams`: an output is wanted after every step, not only at the end."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    continuations: list[Continuation]
    streams: bool
    prompt_logprobs: PromptLogprobs | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    first_token_time: float | None = None
    finished_time: float | None = None

    def fork(self, request_id: str, continuations: list[Continuation]) -> "Request":
        """A request of its own with the same prompt, and with the log-probabilities of it that are known."""
        prompt_logprobs = None if self.prompt_logprobs is None else list(self.prompt_logprobs)
        return Request(
            request_id, self.prompt, self.prompt_token_ids, self.params, continuations, self.streams, prompt_logprobs
        )

    @property
    def is_finished(self) -> bool:
        return all(continuation.sequence.is_finished for continuation in self.continuations)

    def output(self) -> RequestOutput:
        """The request as it stands."""
        bad = any(continuation.sequence.finish_reason == "error" for continuation in self.continuations)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),
            outputs=[continuation.output() for continuation in self.continuations],
            finished=self.is_finished,
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            metrics=RequestMetrics(self.arrival_time, self.first_token_time, self.finished_time),
            num_cached_tokens=self.continuations[0].sequence.num_cached_tokens,
            error="the model's logits held NaN or infinity, or no token was allowed" if bad else None,
        )
