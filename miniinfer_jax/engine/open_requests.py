"""The requests that are open: whose each sequence is, what was read for it, and whose output is still to be given."""

import time
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from miniinfer_jax.engine.request import Continuation, Request, position_logprobs
from miniinfer_jax.engine.runner import StepInFlight
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.outputs import RequestOutput
from miniinfer_jax.sequence import Chunk, Sequence


class OpenRequests:
    """Requests from their arrival until their last output is given."""

    def __init__(self, scheduler: Scheduler, tokenizer: Any) -> None:
        self.by_id: dict[str, Request] = {}  # in order of arrival
        self.owners: dict[Sequence, tuple[Request, Continuation]] = {}
        self.num_prompt_tokens = self.num_generated_tokens = 0
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._news: dict[Request, None] = {}  # whose output somebody is to get

    def enter(self, request: Request) -> None:
        self.by_id[request.request_id] = request
        for continuation in request.continuations:
            if not continuation.sequence.is_finished:
                self.owners[continuation.sequence] = (request, continuation)

    def note_news(self, request: Request) -> None:
        """The next `deliver` gives an output of the request, if it streams or has ended."""
        self._news[request] = None

    def take_results(self, step: StepInFlight, token_ids: list[int]) -> None:
        """Takes the results of a step, a token for each of its rows: tokens to their sequences, and what follows."""
        samples = step.plan.samples
        live = [(row, sequence) for row, sequence in samples if not sequence.is_finished]
        self._take_prompt_logprobs(step)
        self._scheduler.update(step.plan, [token_ids[row] if token_ids[row] >= 0 else None for row, _ in samples])
        for row, sequence in live:
            request, continuation = self.owners[sequence]
            if token_ids[row] >= 0:
                self._take_token(request, continuation, row, step)
            self.note_news(request)

    def deliver(self, request_ids: Collection[str] | None = None) -> list[RequestOutput]:
        """The outputs of the requests (of these, if given) that have news; those that ended are closed."""
        outputs = []
        news = [request for request in self._news if request_ids is None or request.request_id in request_ids]
        for request in news:
            del self._news[request]
            if request.is_finished:
                outputs.append(self.close(request))
            elif request.streams:
                outputs.append(request.output())
        return outputs

    def close(self, request: Request) -> RequestOutput:
        """Forgets a finished request and gives its last output."""
        request.finished_time = time.monotonic()
        for continuation in request.continuations:
            self.owners.pop(continuation.sequence, None)
        self._news.pop(request, None)
        del self.by_id[request.request_id]
        return request.output()

    def _take_token(self, request: Request, continuation: Continuation, row: int, step: StepInFlight) -> None:
        """The newest token of a sequence: its time, its log-probabilities, its text, and a stop string in it."""
        sequence = continuation.sequence
        self.num_generated_tokens += 1
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
            self.num_prompt_tokens += sequence.prompt_len
        num_top = sequence.params.logprobs
        if continuation.logprobs is not None and num_top is not None:
            assert step.output.scores is not None
            logprobs, ids, rank = (np.asarray(values)[row] for values in jax.tree.leaves(step.output.scores))
            continuation.cumulative_logprob += float(logprobs[0])
            continuation.logprobs.append(position_logprobs(logprobs, ids, int(rank), num_top, self._tokenizer))
        if continuation.detokenizer is None:
            return
        token_id, num_tokens = sequence.output_token_ids[-1], len(sequence.output_token_ids)
        if sequence.finish_reason == "stop" and not sequence.params.include_stop_str_in_output:
            continuation.detokenizer.finish(sequence.output_token_ids[:-1])
            return  # the token that stopped it is no part of the text
        stop = continuation.detokenizer.append(token_id, num_tokens)
        if stop is not None:
            self._scheduler.finish(sequence, "stop", stop)
            sequence.finish_reason, sequence.stop_reason = "stop", stop  # also where the length ended it just now
        elif sequence.is_finished:
            continuation.detokenizer.finish(sequence.output_token_ids)

    def _take_prompt_logprobs(self, step: StepInFlight) -> None:
        """The log-probabilities of prompt tokens that this step computed; those of a second prefill are known."""
        query_start = 0
        for chunk in step.plan.chunks:
            request, continuation = self.owners.get(chunk.sequence, (None, None))
            is_first = continuation is not None and continuation.index == 0
            if request is not None and request.prompt_logprobs is not None and is_first and not chunk.is_decode:
                self._take_chunk_logprobs(request, chunk, query_start, step)
            query_start += chunk.length

    def _take_chunk_logprobs(self, request: Request, chunk: Chunk, query_start: int, step: StepInFlight) -> None:
        scores = step.output.prompt_scores
        num_top = request.params.prompt_logprobs
        assert scores is not None and num_top is not None and request.prompt_logprobs is not None
        logprobs, ids, ranks = map(np.asarray, jax.tree.leaves(scores))
        # Token at position p scores the one at p + 1, so entry p + 1 of the list is the next to come.
        first = len(request.prompt_logprobs) - 1
        for position in range(
            max(first, chunk.start), min(chunk.start + chunk.length, len(request.prompt_token_ids) - 1)
        ):
            index = query_start + position - chunk.start
            request.prompt_logprobs.append(
                position_logprobs(logprobs[index], ids[index], int(ranks[index]), num_top, self._tokenizer)
            )
        chunk.sequence.num_unscored = len(request.prompt_token_ids) - len(request.prompt_logprobs)
