"""`LLMEngine`: requests in, steps, outputs out."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import jax

from miniinfer_jax.config import EngineConfig, ModelConfig
from miniinfer_jax.engine.buckets import token_budget
from miniinfer_jax.engine.detokenizer import Detokenizer
from miniinfer_jax.engine.memory import fewer_pages, is_out_of_memory
from miniinfer_jax.engine.open_requests import OpenRequests
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import make_policy
from miniinfer_jax.engine.replay import (
    TakeRecord,
    add_record,
    call_record,
    step_record,
    tokens_record,
)
from miniinfer_jax.engine.request import Continuation, Request
from miniinfer_jax.engine.runner import StepInFlight
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.engine.start import make_runner, num_host_pages
from miniinfer_jax.engine.state_calls import StateCalls
from miniinfer_jax.engine.stats import EngineStats
from miniinfer_jax.engine.step_budget import StepBudget
from miniinfer_jax.engine.steps import LogitsProcessor
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
from miniinfer_jax.outputs import PromptLogprobs, RequestOutput
from miniinfer_jax.sampling_params import MAX_SEED, SamplingParams
from miniinfer_jax.sequence import Sequence, StepPlan

logger = logging.getLogger(__name__)


class LLMEngine(StateCalls):
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
        self._runner, self._num_memory_failures = make_runner(
            model_config, engine_config, params, logits_processors, max_pages, use_tqdm
        )
        target = None if engine_config.target_itl_ms is None else engine_config.target_itl_ms / 1e3
        self._scheduler = Scheduler(
            PageAllocator(self._runner.num_pages),
            page_size=page_size,
            max_num_seqs=engine_config.max_num_seqs,
            max_num_batched_tokens=token_budget(engine_config),
            max_pages_per_sequence=max_pages,
            enable_prefix_caching=engine_config.enable_prefix_caching,
            policy=policy,
            step_budget=StepBudget(self._runner.step_sizes, target),
            num_host_pages=num_host_pages(engine_config, self._runner),
        )
        self._measures_steps, self._last_read = target is not None, 0.0
        self._open = OpenRequests(self._scheduler, tokenizer)
        self._in_flight: deque[StepInFlight] = deque()
        self._sequence_ids = itertools.count()
        self.record: TakeRecord | None = None  # what is told all that happens: see `engine/replay.py`
        self._num_requests = self._num_steps = 0

    def step(self, request_ids: Collection[str] | None = None) -> list[RequestOutput]:
        """Dispatches the next step, then reads the one before it while the device works; the outputs that have news.

        request_ids: of these requests only; the next step gives those of others.
        """
        self._check_awake()
        plan = self._scheduler.schedule()
        if plan.chunks or self._in_flight:
            self._num_steps += bool(plan.chunks)
            self._tell(step_record, plan, self._num_steps, self._open.owners)
        try:
            if plan.chunks:
                self._in_flight.append(self._dispatch(plan))
                self._scheduler.prefetch()  # while the device works
            if not self._in_flight:
                self._scheduler.check()  # idle: every page must be back
            elif not plan.chunks or len(self._in_flight) > 1:  # else the first step of a burst: nothing to read yet
                step = self._in_flight.popleft()
                plan = step.plan
                self._read(step)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._recover(plan, error)
        return self._open.deliver(request_ids)

    def _recover(self, plan: StepPlan, error: Exception) -> None:
        """After the device had no room for a plan: reads what came before it, and starts over smaller.

        Smaller steps need less workspace, and only a smaller pool less than that. Raises the error, with all requests
        still there, where the pool could not be smaller.
        """
        with suppress(jax.errors.JaxRuntimeError):
            self._drain()
        num_pages, budget = self._runner.num_pages, self._runner.smaller_budget(plan)
        while True:
            self._num_memory_failures += 1
            if budget is None:
                before, num_pages = num_pages, fewer_pages(num_pages, self._scheduler.num_pages_needed())
                if num_pages == before:
                    raise error
            logger.warning(
                "the device ran out of memory; all in flight is computed anew, with %d pages, %d tokens a step (%s)",
                *(num_pages, budget or self._scheduler.max_num_batched_tokens, error),
            )
            try:
                return self.start_over(num_pages, budget or self._scheduler.max_num_batched_tokens)
            except jax.errors.JaxRuntimeError as another:
                if not is_out_of_memory(another):
                    raise
                error, budget = another, None

    def start_over(self, num_pages: int, max_num_batched_tokens: int) -> None:
        """Computes everything anew that is in flight, in a pool and in steps of other sizes; no output token is lost.

        Compiles for a pool of another size.
        """
        self._check_awake()
        self._tell(call_record, "start_over", num_pages=num_pages, max_num_batched_tokens=max_num_batched_tokens)
        self._in_flight.clear()
        self._scheduler.start_over(num_pages)
        self._scheduler.max_num_batched_tokens = max_num_batched_tokens
        self._runner.start_over(num_pages)

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
        request = Request(request_id, prompt, token_ids, params, continuations, streams, prompt_logprobs)
        self._queue(request)
        self._tell(add_record, request)

    def fork(
        self, request_id: str, new_request_id: str, *, seed: int | None = None, streams: bool | None = None
    ) -> None:
        """A new request that goes on from what a running one has put out so far, with draws of its own.

        Tokens, text and log-probabilities so far are its own too; of tokens that the device has drawn and nobody has
        seen yet it draws its own. Nothing is computed again: it shares the full pages. It has the parameters of the
        other request; without `seed` it gets one by its number, as a request without a seed does. Raises ValueError,
        with nothing changed, if request_id is not known (any more), or new_request_id is in use.
        """
        request = self._open.by_id.get(request_id)
        if request is None:
            raise RequestError(
                f"request {request_id!r} cannot be forked: it has ended, or was never added; "
                "fork it before its last output"
            )
        self._check_new_id(new_request_id)
        check_seed(seed)
        ids = {"request_id": request_id, "new_request_id": new_request_id}
        self._tell(call_record, "fork", **ids, seed=seed, streams=streams)
        seed = self._default_seed() if seed is None else int(seed)
        self._num_requests += 1
        continuations = [
            continuation.fork(next(self._sequence_ids), (seed + continuation.index) & MAX_SEED)
            for continuation in request.continuations
        ]
        forked = request.fork(new_request_id, continuations)
        forked.streams = request.streams if streams is None else streams
        self._queue(forked)

    def _check_new_id(self, request_id: str) -> None:
        if self.knows(request_id):
            raise RequestError(f"request id {request_id!r} is in use; give every request an id of its own")

    def _queue(self, request: Request) -> None:
        """Takes in a request that was checked."""
        self._open.enter(request)
        for continuation in request.continuations:
            if not continuation.sequence.is_finished:
                self._scheduler.add(continuation.sequence)

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
        request = self._open.by_id.get(request_id)
        if request is None:
            return None
        self._tell(call_record, "abort", request_id=request_id)
        for continuation in request.continuations:
            self._scheduler.abort(continuation.sequence)
        return self._open.close(request)

    def knows(self, request_id: str) -> bool:
        """Whether a request of this id is running or waiting, or has an output that `step` is still to give."""
        return request_id in self._open.by_id

    def outputs(self) -> list[RequestOutput]:
        """How each request stands that is running or waiting, in order of arrival."""
        return [request.output() for request in self._open.by_id.values()]

    def has_requests(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._open.by_id)

    def has_unfinished_requests(self) -> bool:
        """Whether there is anything to compute or to read."""
        return bool(self._open.by_id or self._in_flight)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages, as after a change of the weights; False, with nothing changed, while requests run.

        Requests that wait hold no pages, and are no hindrance.
        """
        self._tell(call_record, "reset_prefix_cache")
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
            num_memory_failures=self._num_memory_failures,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_evictions=scheduler.prefix_cache.num_evictions,
            num_offloaded_pages=len(scheduler.prefix_cache.host_pages),
            num_page_loads=scheduler.prefix_cache.host_pages.num_loads,
            num_steps=self._num_steps,
            num_prompt_tokens=self._open.num_prompt_tokens,
            num_generated_tokens=self._open.num_generated_tokens,
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
        detokenizer = Detokenizer.of(self.tokenizer, params, [])
        return Continuation(index, sequence, detokenizer, logprobs=None if params.logprobs is None else [])

    def _read(self, step: StepInFlight) -> None:
        """Takes the results of a step: tokens to their sequences, and what follows from them."""
        try:
            token_ids = step.token_ids().tolist()
        except jax.errors.JaxRuntimeError:
            self._in_flight.clear()  # they follow the one that failed
            raise
        if self._measures_steps:
            self._measure(step)
        self._tell(tokens_record, step.plan, token_ids, self._open.owners)
        self._open.take_results(step, token_ids)

    def _measure(self, step: StepInFlight) -> None:
        """Tells the budget what a step took, now that it was read: since the one before it, or since it was sent."""
        now = time.monotonic()
        if not step.plan.is_decode_only:
            self._scheduler.step_budget.observe(step.plan.num_tokens, now - max(self._last_read, step.sent))
        self._last_read = now

    def _drain(self) -> None:
        """Reads all steps in flight, so that nothing of a request is known to the device alone."""
        while self._in_flight:
            self._read(self._in_flight.popleft())
