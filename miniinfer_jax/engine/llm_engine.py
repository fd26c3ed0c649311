"""`LLMEngine`: requests in, steps, outputs out."""

import itertools
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from miniinfer_jax.config import EngineConfig, ModelConfig
from miniinfer_jax.engine.batching import CacheShape
from miniinfer_jax.engine.buckets import choose_buckets, token_budget
from miniinfer_jax.engine.detokenizer import Detokenizer
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import make_policy
from miniinfer_jax.engine.request import Continuation, Request, position_logprobs
from miniinfer_jax.engine.runner import Runner, StepInFlight
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.engine.step_budget import StepBudget
from miniinfer_jax.engine.steps import LogitsProcessor, StepContext
from miniinfer_jax.engine.validation import (
    RequestError,
    bad_word_ids,
    check_cache_salt,
    check_params,
    check_prompt,
    check_scheduling,
    check_seed,
    check_something_allowed,
)
from miniinfer_jax.models.decoder import DecoderParams
from miniinfer_jax.ops.attention import choose_backend
from miniinfer_jax.outputs import PromptLogprobs, RequestOutput
from miniinfer_jax.sampling_params import MAX_SEED, SamplingParams
from miniinfer_jax.sequence import Chunk, Sequence, StepPlan


@dataclass(frozen=True)
class EngineStats:
    """How busy the engine is, and what it has done so far."""

    num_running: int
    num_waiting: int
    num_free_pages: int  # hold nothing
    num_cached_pages: int  # hold what a prefix may be found in, and are as good as free ones
    num_pages: int
    num_preemptions: int
    num_prefix_queries: int  # tokens of the sequences that started
    num_prefix_hits: int  # those of them that were in pages already
    num_evictions: int  # cached pages given away
    num_steps: int
    num_prompt_tokens: int
    num_generated_tokens: int


class LLMEngine:
    """Continuous batching over one model: requests join and leave at any step.

    `engine_config.max_model_len` and `num_pages` must be set (see `engine/memory.py`). Not thread-safe.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        params: DecoderParams,
        engine_config: EngineConfig,
        tokenizer: Any = None,
        logits_processors: tuple[LogitsProcessor, ...] = (),
        *,
        use_tqdm: bool = False,
    ) -> None:
        assert engine_config.max_model_len is not None and engine_config.num_pages is not None
        self.model_config = model_config
        self.engine_config = engine_config
        self.max_model_len = engine_config.max_model_len
        self.tokenizer = tokenizer
        policy = make_policy(engine_config.scheduling_policy, engine_config.policy_options)
        page_size = engine_config.page_size
        max_pages = -(-self.max_model_len // page_size)
        shape = CacheShape(engine_config.num_pages, page_size, engine_config.max_num_seqs, max_pages)
        backend = choose_backend(
            engine_config.attention_backend, model_config, params.embedding.dtype.name, page_size, jax.devices()[0]
        )
        context = StepContext(model_config, shape, backend, logits_processors)
        # On a GPU the host waits at a branch; on a CPU it costs nothing, and fewer programs start sooner.
        on_gpu = jax.default_backend() == "gpu"
        buckets = choose_buckets(engine_config, with_plain=on_gpu and not logits_processors)
        self._runner = Runner(context, params, buckets, use_tqdm=use_tqdm)
        if on_gpu:
            self._runner.warm_up()
        target = None if engine_config.target_itl_ms is None else engine_config.target_itl_ms / 1e3
        self._scheduler = Scheduler(
            PageAllocator(engine_config.num_pages),
            page_size=page_size,
            max_num_seqs=engine_config.max_num_seqs,
            max_num_batched_tokens=token_budget(engine_config),
            max_pages_per_sequence=max_pages,
            enable_prefix_caching=engine_config.enable_prefix_caching,
            policy=policy,
            step_budget=StepBudget(sorted({bucket.num_tokens for bucket in buckets.ragged}), target),
        )
        self._measures_steps, self._last_read = target is not None, 0.0
        self._requests: dict[str, Request] = {}
        self._owners: dict[Sequence, tuple[Request, Continuation]] = {}
        self._in_flight: deque[StepInFlight] = deque()
        self._sequence_ids = itertools.count()
        self._num_requests = self._num_steps = self._num_prompt_tokens = self._num_generated_tokens = 0

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step, then reads the one before it while the device works; the outputs that have news."""
        plan = self._scheduler.schedule()
        if plan.chunks:
            self._in_flight.append(self._dispatch(plan))
            self._num_steps += 1
            self._scheduler.prefetch()  # while the device works
        if not self._in_flight:
            self._scheduler.check()  # idle: every page must be back
            return []
        if plan.chunks and len(self._in_flight) == 1:
            return []  # the first step of a burst: nothing to read yet
        return self._collect(self._in_flight.popleft())

    def _dispatch(self, plan: StepPlan) -> StepInFlight:
        """Hands a plan to the device; one that did not get there leaves nothing behind that later steps rely on."""
        try:
            return self._runner.run(plan)
        except BaseException:  # Ctrl-C too: what the plan counts as computed would be found in the cache
            self._scheduler.discard(plan)
            raise

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        *,
        cache_salt: str | None = None,
        streams: bool = True,
        priority: int = 0,
        tenant: str = "",
        expected_output_len: int | None = None,
    ) -> None:
        """Queues a request. Raises ValueError, with nothing changed, for one that this engine cannot serve.

        cache_salt: its pages are shared only with requests of the same salt. For the scheduling policies that ask: a
        smaller `priority` is more urgent, `tenant` is whom the request is for, `expected_output_len` a guess of how
        many tokens it will generate.
        """
        self._check_new_id(request_id)
        self.check_request(prompt_token_ids, params, cache_salt)
        check_scheduling(priority, tenant, expected_output_len)
        token_ids = list(prompt_token_ids)  # the caller's list may change, and pages are found by the tokens
        first = self._make_sequence(0, token_ids, params, cache_salt)
        if params.prompt_logprobs is not None:
            first.num_unscored = first.prompt_len - 1
        others = [self._make_sequence(index, token_ids, params, cache_salt, first) for index in range(1, params.n)]
        for sequence in (first, *others):
            sequence.priority, sequence.tenant = priority, tenant
            sequence.expected_output_len = expected_output_len
        self._num_requests += 1
        continuations = [self._make_continuation(index, sequence) for index, sequence in enumerate((first, *others))]
        prompt_logprobs: PromptLogprobs | None = None if params.prompt_logprobs is None else [None]
        self._queue(Request(request_id, prompt, prompt_token_ids, params, continuations, streams, prompt_logprobs))

    def fork(
        self, request_id: str, new_request_id: str, *, seed: int | None = None, streams: bool | None = None
    ) -> None:
        """A new request that goes on from what a running one has put out so far, with draws of its own.

        Tokens, text and log-probabilities so far are its own too; of tokens that the device has drawn and nobody has
        seen yet it draws its own. Nothing is computed again: it shares the full pages. It has the parameters of the
        other request; without `seed` it gets one by its number, as a request without a seed does. Raises ValueError,
        with nothing changed, if request_id is not known (any more), or new_request_id is in use.
        """
        request = self._requests.get(request_id)
        if request is None:
            raise RequestError(
                f"request {request_id!r} cannot be forked: it has ended, or was never added; "
                "fork it before its last output"
            )
        self._check_new_id(new_request_id)
        check_seed(seed)
        seed = self._default_seed() if seed is None else int(seed)
        self._num_requests += 1
        continuations = [
            continuation.fork(next(self._sequence_ids), (seed + continuation.index) & MAX_SEED)
            for continuation in request.continuations
        ]
        forked = request.fork(new_request_id, continuations)
        forked.streams = request.streams if streams is None else streams
        self._queue(forked)

    def _queue(self, request: Request) -> None:
        """Takes in a request that was checked."""
        self._requests[request.request_id] = request
        for continuation in request.continuations:
            if not continuation.sequence.is_finished:
                self._scheduler.add(continuation.sequence)
                self._owners[continuation.sequence] = (request, continuation)

    def _check_new_id(self, request_id: str) -> None:
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; give every request an id of its own")

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams, cache_salt: str | None = None) -> None:
        """Raises ValueError for a request that this engine cannot serve, however idle it is; queues nothing."""
        check_cache_salt(cache_salt)
        vocab_size = self.model_config.vocab_size
        check_prompt(prompt_token_ids, vocab_size, self.max_model_len, self._remedy(len(prompt_token_ids)))
        check_params(params, vocab_size, self.tokenizer is not None)
        sequence = self._make_sequence(0, prompt_token_ids, params, cache_salt)
        check_something_allowed(sequence)
        self._scheduler.check_fits(sequence)

    def _remedy(self, prompt_len: int) -> str:
        """How to make room for a prompt of this length: the pool may be what limits max_model_len."""
        num_pages, page_size = self._scheduler.allocator.num_pages, self.engine_config.page_size
        missing = -(-prompt_len // page_size) - num_pages
        if missing > 0 and prompt_len < self.model_config.max_position:
            return f"raise num_pages by {missing} (or gpu_memory_utilization)"
        return "raise max_model_len"

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at any point and gives its last output; None for one that is not (or no longer) known."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for continuation in request.continuations:
            self._scheduler.abort(continuation.sequence)
        return self._close(request)

    def has_requests(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._requests)

    def has_unfinished_requests(self) -> bool:
        """Whether there is anything to compute or to read."""
        return bool(self._requests or self._in_flight)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages, as after a change of the weights; False, with nothing changed, while requests run.

        Requests that wait hold no pages, and are no hindrance.
        """
        return self._scheduler.reset_prefix_cache()

    def check(self) -> None:
        """Raises RuntimeError unless every page and slot is free or owned exactly as often as it is referenced."""
        self._scheduler.check()

    def stats(self) -> EngineStats:
        """Counters, read without touching the device."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_pages=scheduler.allocator.num_free,
            num_cached_pages=scheduler.allocator.num_cached,
            num_pages=scheduler.allocator.num_pages,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_evictions=scheduler.prefix_cache.num_evictions,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
        )

    def device_arrays_bytes(self) -> dict[str, int]:
        """Bytes on the device of the "weights", of the "pages" and of the slots' "state"."""
        return self._runner.device_arrays_bytes()

    def program_texts(self, num_rows: int | None = None) -> list[str]:
        """The compiled steps as HLO text: the one that decodes num_rows sequences of plain requests, or all."""
        return self._runner.program_texts(num_rows)

    def _default_seed(self) -> int:
        """Without a seed of its own a request gets one from its number: the same run draws the same tokens."""
        return self.engine_config.seed + 1_000_003 * self._num_requests

    def _make_sequence(
        self,
        index: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        cache_salt: str | None,
        parent: Sequence | None = None,
    ) -> Sequence:
        seed = params.seed if params.seed is not None else self._default_seed()
        room = self.max_model_len - len(prompt_token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        return Sequence(
            sequence_id=next(self._sequence_ids),
            prompt_token_ids=prompt_token_ids,
            params=params,
            seed=(seed + index) & MAX_SEED,
            max_len=len(prompt_token_ids) + max_tokens,
            eos_token_ids=self.model_config.eos_token_ids,
            bad_words=bad_word_ids(params, self.tokenizer),
            cache_salt=cache_salt,
            parent=parent,
        )

    def _make_continuation(self, index: int, sequence: Sequence) -> Continuation:
        params = sequence.params
        has_text = params.detokenize and self.tokenizer is not None
        detokenizer = Detokenizer(self.tokenizer, params) if has_text else None
        return Continuation(index, sequence, detokenizer, logprobs=None if params.logprobs is None else [])

    def _collect(self, step: StepInFlight) -> list[RequestOutput]:
        """Takes the results of a step: tokens to their sequences, and what follows from them."""
        token_ids, samples = step.token_ids().tolist(), step.plan.samples
        if self._measures_steps:
            self._measure(step)
        live = [(row, sequence) for row, sequence in samples if not sequence.is_finished]
        tokens = [token_ids[row] if token_ids[row] >= 0 else None for row, _ in samples]
        self._take_prompt_logprobs(step)
        self._scheduler.update(step.plan, tokens)

        news: dict[Request, None] = {}
        for row, sequence in live:
            request, continuation = self._owners[sequence]
            if token_ids[row] >= 0:
                self._take_token(request, continuation, row, step)
            news[request] = None
        outputs = []
        for request in news:
            if request.is_finished:
                outputs.append(self._close(request))
            elif request.streams:
                outputs.append(request.output())
        return outputs

    def _measure(self, step: StepInFlight) -> None:
        """Tells the budget what a step took, now that it was read: since the one before it, or since it was sent."""
        now = time.monotonic()
        if not step.plan.is_decode_only:
            self._scheduler.step_budget.observe(step.plan.num_tokens, now - max(self._last_read, step.sent))
        self._last_read = now

    def _take_token(self, request: Request, continuation: Continuation, row: int, step: StepInFlight) -> None:
        """The newest token of a sequence: its time, its log-probabilities, its text, and a stop string in it."""
        sequence = continuation.sequence
        self._num_generated_tokens += 1
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
            self._num_prompt_tokens += sequence.prompt_len
        num_top = sequence.params.logprobs
        if continuation.logprobs is not None and num_top is not None:
            assert step.output.scores is not None
            logprobs, ids, rank = (np.asarray(values)[row] for values in jax.tree.leaves(step.output.scores))
            continuation.cumulative_logprob += float(logprobs[0])
            continuation.logprobs.append(position_logprobs(logprobs, ids, int(rank), num_top, self.tokenizer))
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
            request, continuation = self._owners.get(chunk.sequence, (None, None))
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
        first, prompt_len = len(request.prompt_logprobs) - 1, chunk.sequence.prompt_len
        for position in range(max(first, chunk.start), min(chunk.start + chunk.length, prompt_len - 1)):
            index = query_start + position - chunk.start
            request.prompt_logprobs.append(
                position_logprobs(logprobs[index], ids[index], int(ranks[index]), num_top, self.tokenizer)
            )
        chunk.sequence.num_unscored = prompt_len - len(request.prompt_logprobs)

    def _close(self, request: Request) -> RequestOutput:
        """Forgets a finished request and gives its last output."""
        request.finished_time = time.monotonic()
        for continuation in request.continuations:
            self._owners.pop(continuation.sequence, None)
        del self._requests[request.request_id]
        return request.output()
