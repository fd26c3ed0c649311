"""Owns what lives on the device (weights, cache, slot state) and the compiled programs; turns plans into tokens."""

import logging
import os
import time
import timeit
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import DecodeState, StepOutput, TokenRules, create_state
from miniinfer_jax.engine.batching import (
    NUM_COLUMNS,
    NUM_COPIES,
    NUM_SHARED_PAGES,
    pack_decode,
    pack_ragged,
    pack_sharing,
)
from miniinfer_jax.engine.buckets import Buckets, DecodeBucket, RaggedBucket
from miniinfer_jax.engine.steps import StepContext, decode_step, ragged_step, share_pages
from miniinfer_jax.engine.token_rules import RuleRows, rule_rows
from miniinfer_jax.kv_cache import KVCache
from miniinfer_jax.models.decoder import DecoderParams
from miniinfer_jax.sequence import HostCopy, PageCopy, Sequence, StepPlan

logger = logging.getLogger(__name__)

NUM_PAGES_MOVED = 16  # whole pages that go between host and device in one call of a program


@dataclass(frozen=True)
class StepInFlight:
    """A dispatched step: its plan, the arrays that will hold its results, and when it was sent, as time.monotonic()."""

    plan: StepPlan
    output: StepOutput
    sent: float

    def token_ids(self) -> np.ndarray:
        """[B], -1 where nothing could be drawn; waits for the step to end."""
        return np.asarray(self.output.token_ids)


@dataclass(frozen=True)
class Sleep:
    """What a sleeping runner keeps in host memory: weights as numpy arrays, and pages, one array a layer."""

    weights: DecoderParams
    shardings: DecoderParams
    page_ids: list[int]
    pages: tuple[np.ndarray, ...]


def _set_rules(state: DecodeState, slot: jax.Array, rows: RuleRows) -> DecodeState:
    """The state with the rules of one slot replaced."""
    arrays = TokenRules(*map(jnp.asarray, rows))
    return replace(state, rules=jax.tree.map(lambda old, new: old.at[slot].set(new), state.rules, arrays))


def _set_page_table(state: DecodeState, slot: jax.Array, row: jax.Array) -> DecodeState:
    """The state with the page table [P] of one slot replaced."""
    return replace(state, page_table=state.page_table.at[slot].set(row))


class Runner:
    """Runs plans. Everything that can be compiled is compiled when it is made; after that, nothing."""

    def __init__(
        self, context: StepContext, params: DecoderParams, buckets: Buckets, *, use_tqdm: bool, offloads: bool = False
    ) -> None:
        self._context = context
        self._buckets = buckets
        self._params = params
        self._offloads = offloads  # whether pages go to host memory and come back one by one
        self._host_pages: dict[int, jax.Array] = {}  # by place: [L, S, K, 2, H] in host memory, or on their way there
        self._sleep: Sleep | None = None
        self._create_buffers()
        self._programs = self._compile_all(use_tqdm)

    def _create_buffers(self) -> None:
        """What the steps write to: an empty pool, empty slots, and no tokens."""
        config, shape = self._context.config, self._context.shape
        dtype = self._params.embedding.dtype.name
        self._cache = kv_cache.create(config, shape.num_pages, shape.page_size, dtype)
        self._state = create_state(shape.num_slots, shape.max_pages, config.vocab_size)
        # The tokens of the last two decode steps, newest last; the older have been read, and give way to the next.
        self._outboxes = deque(jnp.zeros((shape.num_slots + 1,), jnp.int32) for _ in range(2))
        self._sent_decode: tuple[np.ndarray, jax.Array | None] = np.empty(0), None

    def _drop_buffers(self) -> None:
        """Lets go of what `_create_buffers` made, as far as it came."""
        for name in ("_cache", "_state", "_outboxes", "_sent_decode"):
            vars(self).pop(name, None)

    def run(self, plan: StepPlan) -> StepInFlight:
        """Dispatches the step and returns at once; its arrays fill while the host goes on."""
        for chunk in plan.chunks:
            if chunk.is_first:
                self.send_rules(chunk.sequence)
        self.move_pages(plan.offloads, plan.loads)
        self._share_pages(plan)
        bucket = self._bucket_for(plan)
        if isinstance(bucket, DecodeBucket):
            plan.chunks.sort(key=lambda chunk: chunk.start)  # rows of like length may share a tile of attention
        sent = time.monotonic()
        output = self._dispatch(bucket, plan)
        for array in self._wanted(plan, output):
            array.copy_to_host_async()
        return StepInFlight(plan, output, sent)

    @property
    def step_sizes(self) -> list[int]:
        """Tokens of the steps that prompts may be in, ascending."""
        return sorted({bucket.num_tokens for bucket in self._buckets.ragged})

    def _bucket_for(self, plan: StepPlan) -> DecodeBucket | RaggedBucket:
        if self._buckets.decode and plan.is_decode_only:
            return self._buckets.for_rows(len(plan.chunks), plan.is_plain)
        return self._buckets.for_chunks(plan.num_tokens, len(plan.chunks), plan.is_plain)

    def smaller_budget(self, plan: StepPlan) -> int | None:
        """The most tokens of a step that needs less memory than this plan's; None if only a smaller pool helps."""
        bucket = self._bucket_for(plan)
        smaller = [other.num_tokens for other in self._buckets.ragged if other.num_tokens < bucket.num_tokens]
        return max(smaller, default=None) if isinstance(bucket, RaggedBucket) else None

    def start_over(self, num_pages: int) -> None:
        """Makes buffers anew, those there are having been lost; compiles all anew for a pool of another size."""
        self._drop_buffers()
        if num_pages != self._context.shape.num_pages:
            self._context = replace(self._context, shape=replace(self._context.shape, num_pages=num_pages))
            self._create_buffers()
            self._programs = self._compile_all(use_tqdm=False)
        else:
            self._create_buffers()
        self.warm_up_on_gpu()

    def warm_up(self) -> None:
        """Runs every step twice over nothing but padding, which leaves no trace.

        At the first run a GPU loads the kernels, at the second XLA records their CUDA graph; requests need not wait
        for either.
        """
        for _ in range(2):
            self._share_pages(StepPlan(copies=[PageCopy(0, 0)]))
            for bucket in (*self._buckets.decode, *self._buckets.ragged):
                self._dispatch(bucket, StepPlan())

    def move_pages(self, offloads: list[HostCopy], loads: list[HostCopy]) -> None:
        """Sends pages to host memory, and brings pages back from where they were before; waits for neither."""
        if not offloads and not loads:
            return
        host, device = (self._memory(kind) for kind in ("pinned_host", "device"))
        sent = {
            copy.place: jax.device_put(self._programs["take_page"](self._cache, np.int32(copy.page)), host)
            for copy in offloads
        }
        for copy in loads:
            page = jax.device_put(self._host_pages[copy.place], device)
            self._cache = self._programs["put_page"](self._cache, np.int32(copy.page), page)
        self._host_pages |= sent

    def _memory(self, kind: str) -> jax.sharding.SingleDeviceSharding:
        """Where arrays lie in a memory of the device of this kind; in its own where it has no such memory."""
        device = self._cache.layers[0].devices().pop()
        kinds = {memory.kind for memory in device.addressable_memories()}
        return jax.sharding.SingleDeviceSharding(device, memory_kind=kind if kind in kinds else None)

    def measure_pages(self) -> tuple[float, float]:
        """Seconds to bring a page back from host memory, and to compute the tokens of one, both over padding."""
        no_page = HostCopy(self.num_pages, 0)
        self.move_pages([HostCopy(0, 0)], [])
        largest = max(self._buckets.ragged, key=lambda bucket: bucket.num_tokens)

        def bring_back() -> None:
            self.move_pages([], [no_page])
            jax.block_until_ready(self._cache)

        def compute() -> None:
            jax.block_until_ready(self._dispatch(largest, StepPlan()))

        seconds = min(timeit.repeat(bring_back, number=1)), min(timeit.repeat(compute, number=1))
        self._host_pages.clear()
        return seconds[0], seconds[1] / largest.num_tokens * self._context.shape.page_size

    def send_rules(self, sequence: Sequence) -> None:
        """Tells the device what the request of a running sequence says about single tokens, its outputs counted."""
        if sequence.params.uses_token_rules:
            rows = rule_rows(sequence, self._context.config.vocab_size)
            self._state = self._programs["set_rules"](self._state, np.int32(sequence.slot or 0), rows)

    def send_page_table(self, sequence: Sequence) -> None:
        """Tells the device all pages of a running sequence at once; a plan names only those that are new."""
        row = np.zeros(self._context.shape.max_pages, np.int32)
        row[: len(sequence.pages)] = sequence.pages
        self._state = self._programs["set_page_table"](self._state, np.int32(sequence.slot or 0), row)

    def read_pages(self, page_ids: list[int]) -> tuple[np.ndarray, ...]:
        """The contents of pages [n] after all steps dispatched so far, one array a layer: [n, S, K, 2, H]; waits."""
        read = tuple(np.empty((len(page_ids), *layer.shape[1:]), layer.dtype) for layer in self._cache.layers)
        for ids, rows in self._page_batches(page_ids):
            for layer, part in zip(read, self._programs["take_pages"](self._cache, ids), strict=True):
                layer[rows] = np.asarray(part)[: rows.stop - rows.start]
        return read

    def write_pages(self, page_ids: list[int], pages: tuple[np.ndarray, ...]) -> None:
        """Fills pages [n] from one array a layer, [n, S, K, 2, H], before whatever step is dispatched next."""
        for ids, rows in self._page_batches(page_ids):
            values = tuple(np.zeros((NUM_PAGES_MOVED, *layer.shape[1:]), layer.dtype) for layer in pages)
            for value, layer in zip(values, pages, strict=True):
                value[: rows.stop - rows.start] = layer[rows]
            self._cache = self._programs["put_pages"](self._cache, ids, values)

    def _page_batches(self, page_ids: list[int]) -> Iterator[tuple[np.ndarray, slice]]:
        """(ids of NUM_PAGES_MOVED pages, padded with one past the end; where in page_ids they stand)."""
        for start in range(0, len(page_ids), NUM_PAGES_MOVED):
            rows = slice(start, min(start + NUM_PAGES_MOVED, len(page_ids)))
            ids = np.full(NUM_PAGES_MOVED, self._context.shape.num_pages, np.int32)
            ids[: rows.stop - rows.start] = page_ids[rows]
            yield ids, rows

    @property
    def page_bytes(self) -> int:
        return sum(layer.nbytes for layer in self._cache.layers) // self.num_pages

    @property
    def num_pages(self) -> int:
        return self._context.shape.num_pages

    @property
    def is_asleep(self) -> bool:
        return self._sleep is not None

    def sleep(self, page_ids: list[int]) -> None:
        """Moves the weights and these pages to host memory, and lets go of everything on the device; waits."""
        pages = self.read_pages(page_ids)
        # A copy: on a CPU device numpy would share the memory that is to be freed.
        weights = jax.tree.map(lambda array: np.array(array, copy=True), self._params)
        self._sleep = Sleep(weights, jax.tree.map(lambda array: array.sharding, self._params), page_ids, pages)
        del self._params
        self._drop_buffers()

    def wake_up(self) -> None:
        """Brings weights and pages back to the device; slots are empty, and page tables must be sent again."""
        assert self._sleep is not None
        asleep, self._sleep = self._sleep, None
        self._params = jax.device_put(asleep.weights, asleep.shardings)
        self._create_buffers()
        self.write_pages(asleep.page_ids, asleep.pages)

    @property
    def params(self) -> DecoderParams:
        return self._params

    def warm_up_on_gpu(self) -> None:
        """`warm_up` where it is of use: other devices record no graphs."""
        if jax.default_backend() == "gpu":
            self.warm_up()

    def device_arrays_bytes(self) -> dict[str, int]:
        """Bytes of what lives on the device between steps."""
        if self.is_asleep:
            return {"weights": 0, "pages": 0, "state": 0}
        owned = {"weights": self._params, "pages": self._cache, "state": self._state}
        return {name: sum(array.nbytes for array in jax.tree.leaves(tree)) for name, tree in owned.items()}

    def program_texts(self, num_rows: int | None) -> list[str]:
        """The compiled steps as HLO text: the one that decodes num_rows sequences of plain requests, or all."""
        chosen = [*self._buckets.decode, *self._buckets.ragged]
        if num_rows is not None and self._buckets.decode:
            chosen = [self._buckets.for_rows(num_rows, is_plain=True)]
        return [self._programs[bucket].as_text() or "" for bucket in chosen]

    def _dispatch(self, bucket: DecodeBucket | RaggedBucket, plan: StepPlan) -> StepOutput:
        """Runs the bucket's program over the plan, which must fit it."""
        if isinstance(bucket, RaggedBucket):
            return self._call(bucket, pack_ragged(plan, bucket, self._context.shape))
        packed = self._send_decode(pack_decode(plan, bucket, self._context.shape))
        output = self._call(bucket, packed, self._outboxes.popleft())
        self._outboxes.append(output.token_ids)
        return output

    def _call(self, bucket: DecodeBucket | RaggedBucket, *arguments: Any) -> StepOutput:
        step = self._programs[bucket]
        self._cache, self._state, output = step(self._params, self._cache, self._state, *arguments)
        return output

    def _share_pages(self, plan: StepPlan) -> None:
        """What the step finds in pages already, made ready before it."""
        for packed in pack_sharing(plan, self._context.shape):
            self._cache, self._state = self._programs["share_pages"](self._cache, self._state, packed)

    def _send_decode(self, packed: np.ndarray) -> jax.Array:
        """The array on the device: that of the step before if it is the same, for XLA to replay its graph unchanged."""
        before, sent = self._sent_decode
        if sent is None or not np.array_equal(before, packed):
            sent = jax.device_put(packed)
            self._sent_decode = packed, sent
        return sent

    @staticmethod
    def _wanted(plan: StepPlan, output: StepOutput) -> list[jax.Array]:
        """The result arrays that the host will read: only what some request of the plan asked for."""
        wanted = [output.token_ids]
        sampling = [chunk.sequence.params for chunk in plan.chunks if chunk.samples]
        if any(params.logprobs is not None for params in sampling):
            wanted += jax.tree.leaves(output.scores)
        prefills = [chunk.sequence.params for chunk in plan.chunks if not chunk.is_decode]
        if any(params.prompt_logprobs is not None for params in prefills):
            wanted += jax.tree.leaves(output.prompt_scores)
        return wanted

    def _compile_all(self, use_tqdm: bool) -> dict[Any, jax.stages.Compiled]:
        """Every program of the engine, compiled in threads: XLA lets go of Python's lock.

        They are lowered one after the other: that is Python's work, many times slower in threads that wait for its
        lock, and in another order their texts differ, which the compile cache then does not know.
        """
        jobs = self._lowerings()
        # Steps over as many tokens hold the same matrix products. First one of each size: XLA times the kernels for its
        # products, and finds its choice again in the others.
        leading = {key if isinstance(key, str) else key.num_tokens: key for key in reversed(jobs)}.values()
        programs: dict[Any, jax.stages.Compiled] = {}
        progress = tqdm(total=len(jobs), desc="Compiling", disable=not use_tqdm)
        executor = ThreadPoolExecutor(max_workers=os.cpu_count())

        def collect(futures: dict[Future[jax.stages.Compiled], Any]) -> None:
            for future in as_completed(futures):
                programs[futures[future]] = future.result()
                progress.update()

        try:
            compiling = {executor.submit(jobs[key]().compile): key for key in leading}
            lowered = {key: lower() for key, lower in jobs.items() if key not in leading}
            collect(compiling)
            collect({executor.submit(step.compile): key for key, step in lowered.items()})
        finally:
            # On Ctrl-C: nothing new is begun, and what is being written to the compile cache gets written whole.
            executor.shutdown(wait=True, cancel_futures=True)
        return programs

    def _lowerings(self) -> dict[Any, Callable[[], jax.stages.Lowered]]:
        """What is compiled, by its key: a bucket, or a name."""

        def shapes(tree: Any) -> Any:
            return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)

        def int32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        context = self._context
        params, cache, state = shapes(self._params), shapes(self._cache), shapes(self._state)
        jobs: dict[Any, Callable[[], jax.stages.Lowered]] = {}
        for bucket in self._buckets.decode:
            step = jax.jit(partial(decode_step, context, bucket.is_plain), donate_argnums=(1, 2, 4))
            packed, outbox = int32(2, bucket.num_rows), int32(context.shape.num_slots + 1)
            jobs[bucket] = partial(step.lower, params, cache, state, packed, outbox)
        for bucket in self._buckets.ragged:
            step = jax.jit(partial(ragged_step, context, bucket), donate_argnums=(1, 2))
            length = bucket.num_tokens + bucket.num_rows * NUM_COLUMNS + bucket.num_new_pages * 3
            jobs[bucket] = partial(step.lower, params, cache, state, int32(length))
        share = jax.jit(share_pages, donate_argnums=(0, 1))
        jobs["share_pages"] = partial(share.lower, cache, state, int32(3 * NUM_SHARED_PAGES + 2 * NUM_COPIES))
        set_rules = jax.jit(_set_rules, donate_argnums=0)
        row = shapes(jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), state.rules))
        rows = RuleRows(row.counts, row.flags, row.bias, row.bad_words)
        jobs["set_rules"] = partial(set_rules.lower, state, int32(), rows)
        set_page_table = jax.jit(_set_page_table, donate_argnums=0)
        jobs["set_page_table"] = partial(set_page_table.lower, state, int32(), int32(context.shape.max_pages))
        return jobs | self._page_lowerings(cache)

    def _page_lowerings(self, cache: KVCache) -> dict[Any, Callable[[], jax.stages.Lowered]]:
        """The programs that move whole pages between host and device; `cache` holds shapes."""
        page_ids = jax.ShapeDtypeStruct((NUM_PAGES_MOVED,), jnp.int32)
        pages = tuple(jax.ShapeDtypeStruct((NUM_PAGES_MOVED, *one.shape[1:]), one.dtype) for one in cache.layers)
        put_pages = jax.jit(kv_cache.put_pages, donate_argnums=0)
        page_id, [num_layers, first] = jax.ShapeDtypeStruct((), jnp.int32), [len(cache.layers), cache.layers[0]]
        page = jax.ShapeDtypeStruct((num_layers, *first.shape[1:]), first.dtype)
        one_by_one = {
            "take_page": partial(jax.jit(kv_cache.take_page).lower, cache, page_id),
            "put_page": partial(jax.jit(kv_cache.put_page, donate_argnums=0).lower, cache, page_id, page),
        }
        return (one_by_one if self._offloads else {}) | {
            "take_pages": partial(jax.jit(kv_cache.take_pages).lower, cache, page_ids),
            "put_pages": partial(put_pages.lower, cache, page_ids, pages),
        }
