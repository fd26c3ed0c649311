"""What an engine does with its own state: it goes back, is taken as a value, takes one up, and sleeps."""

from collections.abc import Callable
from typing import Any

import numpy as np

from miniinfer_jax.config import EngineConfig, ModelConfig
from miniinfer_jax.engine.open_requests import OpenRequests
from miniinfer_jax.engine.replay import Record, ReplayError, TakeRecord, call_record
from miniinfer_jax.engine.request_state import request_of, state_of
from miniinfer_jax.engine.runner import Runner
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.engine.snapshot import Snapshot, SnapshotError, check_model, describe_model, live_pages
from miniinfer_jax.engine.validation import EngineAsleep, RequestError, check_ids, check_rewind
from miniinfer_jax.outputs import RequestOutput
from miniinfer_jax.sampling_params import MAX_SEED, SamplingParams
from miniinfer_jax.sequence import Sequence


class StateCalls:
    """A part of `LLMEngine`, which has the attributes and the methods that are only named here."""

    model_config: ModelConfig
    engine_config: EngineConfig
    tokenizer: Any
    record: TakeRecord | None
    _scheduler: Scheduler
    _runner: Runner
    _open: OpenRequests
    _num_requests: int
    _drain: Callable[[], None]
    _check_new_id: Callable[[str], None]
    check_request: Callable[[list[int], SamplingParams, str | None], None]
    _make_sequence: Callable[[int, list[int], SamplingParams, str | None, Sequence | None], Sequence]

    def rewind(self, request_id: str, num_tokens: int, *, seed: int | None = None) -> RequestOutput:
        """Takes back the last num_tokens tokens that a request drew, each of its sequences; how it stands then.

        It goes on from there, and draws the same tokens again unless it is given another seed. Steps in flight are read
        first, and their tokens count. Raises ValueError, with nothing changed, for a request that is not known or has
        ended, and for more tokens than it drew.
        """
        self._check_awake()
        self._tell(call_record, "rewind", request_id=request_id, num_tokens=num_tokens, seed=seed)
        self._drain()
        request = self._open.by_id.get(request_id)
        if request is None:
            raise RequestError(f"request {request_id!r} is not running or waiting; rewind one that is not finished")
        check_rewind(request_id, [one.sequence for one in request.continuations], num_tokens, seed)
        for continuation in request.continuations:
            sequence = continuation.sequence
            self._scheduler.rewind(sequence, num_tokens)
            continuation.forget(num_tokens)
            if seed is not None:
                sequence.seed = (int(seed) + continuation.index) & MAX_SEED
        return request.output()

    @property
    def is_sleeping(self) -> bool:
        return self._runner.is_asleep

    def sleep(self, *, keep_cache: bool = False) -> None:
        """Frees the device: weights go to host memory, keys and values too (keep_cache) or are dropped.

        Requests stay and may be added or aborted; what was dropped is computed anew after `wake_up`. Until then
        everything that needs the device raises EngineAsleep. Does nothing if the engine sleeps already.
        """
        if self.is_sleeping:
            return
        self._tell(call_record, "sleep", keep_cache=keep_cache)
        self._drain()
        if not keep_cache:
            self._scheduler.preempt_all()
        self._runner.sleep(self._scheduler.allocator.occupied())

    def wake_up(self) -> None:
        """Brings a sleeping engine back to the device; nothing is compiled. Does nothing if it is awake."""
        if not self.is_sleeping:
            return
        self._tell(call_record, "wake_up")
        self._runner.wake_up()
        self._runner.warm_up_on_gpu()  # XLA records its graphs anew for buffers that lie elsewhere
        for sequence in self._scheduler.running:
            self._runner.send_page_table(sequence)
            self._scheduler.rewind(sequence, 0)  # the slot must be told its last token and its sampling values

    def _check_awake(self) -> None:
        if self.is_sleeping:
            raise EngineAsleep("the engine sleeps, its weights are in host memory: call wake_up() first")

    def snapshot(self) -> Snapshot:
        """The engine's requests, with the keys and values computed so far, as a value; the engine goes on unchanged."""
        self._check_awake()
        self._tell(call_record, "snapshot")
        self._drain()
        tables = [continuation.sequence.pages for _, continuation in self._open.owners.values()]
        rows = live_pages(tables)
        return Snapshot(
            model=self.describe_model(),
            page_size=self.engine_config.page_size,
            num_requests=self._num_requests,
            requests=tuple(state_of(request, rows) for request in self._open.by_id.values()),
            pages=self._runner.read_pages(list(rows)),
        )

    def restore(self, snapshot: Snapshot) -> list[str]:
        """Takes up the requests of a snapshot, behind those that are here already; their ids.

        What finds no pages or no slot waits, and is computed anew. Raises ValueError, with nothing changed, for the
        snapshot of another model and for a request that this engine cannot serve or whose id is in use.
        """
        self._check_awake()
        if self.record is not None:
            raise ReplayError("an engine that records takes up no snapshot: its log would not say what was in it")
        if not isinstance(snapshot, Snapshot):
            raise SnapshotError(f"{snapshot!r:.80} is no snapshot; take one, or load one with Snapshot.load(folder)")
        check_model(snapshot.model, self.describe_model())
        snapshot.check_pages(self.model_config)
        for state in snapshot.requests:
            for one in state.sequences:
                check_ids(
                    f"request {state.request_id!r} of the snapshot", one.output_token_ids, self.model_config.vocab_size
                )
            self._check_new_id(state.request_id)
            self.check_request(list(state.prompt_token_ids), state.params, state.cache_salt)
        requests = [request_of(state, self._make_sequence, self.tokenizer) for state in snapshot.requests]
        for request in requests:
            for continuation in request.continuations:
                if not continuation.sequence.is_finished:
                    self._scheduler.check_fits(continuation.sequence)
        self._num_requests = max(self._num_requests, snapshot.num_requests)
        page_size = self.engine_config.page_size
        for request, state in zip(requests, snapshot.requests, strict=True):
            self._open.enter(request)
            for continuation, one in zip(request.continuations, state.sequences, strict=True):
                if not continuation.sequence.is_finished:
                    self._resume(continuation.sequence, one.num_computed, snapshot.pages_of(one, page_size))
            if request.is_finished:
                self._open.note_news(request)
        return [request.request_id for request in requests]

    def _resume(self, sequence: Sequence, num_computed: int, pages: tuple[np.ndarray, ...]) -> None:
        num_filled = self._scheduler.resume(sequence, num_computed)
        self._runner.move_pages(self._scheduler.prefix_cache.take_offloads(), [])
        if num_filled is not None:
            self._runner.write_pages(sequence.pages[num_filled:], tuple(layer[num_filled:] for layer in pages))
            self._runner.send_page_table(sequence)

    def describe_model(self) -> dict[str, Any]:
        """What decides which tokens follow: the configuration, the dtype and a checksum of the weights."""
        return describe_model(self.model_config, self._runner.params)

    def _tell(self, make: Callable[..., Record], *values: Any, **named: Any) -> None:
        """Makes a record, if anybody wants it."""
        if self.record is not None:
            self.record(make(*values, **named))
