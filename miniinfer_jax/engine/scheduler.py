"""What runs in the next step: shares the token budget, the slots and the pages among sequences. Plain integers only."""

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Any

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import POLICIES
from miniinfer_jax.sequence import Chunk, NewPage, Sequence, SequenceStatus, StepPlan


class Scheduler:
    """Continuous batching with chunked prefill, over one page pool.

    The engine runs one step ahead of the device, so `schedule` may be called again before the tokens of the
    steps before are read: it counts a step as done when it plans it. `update` then takes the tokens, step by step
    in the order of the plans.

    The pages of the pool, and what a running sequence holds of them (one slot, one row of the page table):

        [ free | sequence in slot 0 | sequence in slot 1 | ... ]     pages_for(num_computed) pages each

    Waiting sequences hold neither pages nor a slot. Nothing can lock up: `add` refuses what the whole pool could
    not hold, pages are taken from the sequence that is last by policy, so the first one always goes on, and with
    nothing running the first waiting one always fits.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_pages_per_sequence: int,
        policy: str = "fcfs",
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"scheduling policy {policy!r} is not known; known: {', '.join(POLICIES)}")
        self.allocator = allocator
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_pages_per_sequence = max_pages_per_sequence
        self.num_preemptions = 0
        self._key = POLICIES[policy]
        self._unfinished: dict[int, Sequence] = {}  # by sequence id, running or waiting
        self._running: dict[int, Sequence] = {}  # by sequence id
        self._waiting: list[tuple[Any, Sequence]] = []  # a heap of (key, sequence); may hold finished ones
        self._free_slots = list(reversed(range(max_num_seqs)))

    @property
    def has_work(self) -> bool:
        return bool(self._unfinished)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._unfinished) - len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence. Raises ValueError if it could never be computed, even alone in the pool."""
        self._enter(sequence)
        self._queue(sequence)

    def resume(self, sequence: Sequence, num_computed: int) -> bool:
        """Takes a sequence whose first num_computed tokens have keys and values outside of the pool.

        True: it runs and holds pages for them, which the caller fills before the next step. False: there is no room,
        so that it waits, and will be computed anew. Raises ValueError as `add` does.
        """
        self._enter(sequence)
        claimed = sum(map(self._claim, self._running.values())) + self._claim(sequence)
        if num_computed == 0 or not self._free_slots or claimed > self.allocator.num_free:
            self._queue(sequence)
            return False
        self._start(sequence)
        sequence.pages = self.allocator.allocate(self._num_pages_for(num_computed))
        sequence.num_computed = num_computed
        return True

    def check_fits(self, sequence: Sequence) -> None:
        """Raises ValueError, with what to raise and by how much, for a sequence too long for the whole pool."""
        if not 0 < sequence.prompt_len < sequence.max_len:
            raise ValueError(
                f"the prompt has {sequence.prompt_len} tokens of at most {sequence.max_len} for prompt and output; "
                "it needs at least 1, and room for 1 more: shorten it, or raise max_model_len"
            )
        needed = self._num_pages_for(sequence.max_len - 1)  # the last token drawn is never computed
        size = f"a sequence of up to {sequence.max_len} tokens needs {needed} pages of {self.page_size} tokens"
        if needed > self.max_pages_per_sequence:
            missing = needed - self.max_pages_per_sequence
            raise ValueError(
                f"{size}, and a page table holds {self.max_pages_per_sequence}: "
                f"raise max_model_len by {missing * self.page_size}, or lower max_tokens"
            )
        if needed > self.allocator.num_pages:
            raise ValueError(
                f"{size}, and num_pages is {self.allocator.num_pages}: raise num_pages by "
                f"{needed - self.allocator.num_pages} (or gpu_memory_utilization), or lower max_tokens"
            )

    def schedule(self) -> StepPlan:
        """The next step, counted as done: running sequences first, then as many waiting ones as fit.

        The plan is empty when nothing waits, or when everything waits for tokens to be read by `update`.
        """
        plan = StepPlan()
        for sequence, length in self._share_budget():
            # Sequences come first by policy first and are preempted last first: what has a chunk keeps its pages.
            if sequence.status is SequenceStatus.RUNNING and self._make_room(sequence, length, plan):
                self._append_chunk(sequence, length, plan)
        if not plan.preempted:  # a step that ran out of pages has none for newcomers
            self._admit(plan)
        return plan

    def update(self, plan: StepPlan, token_ids: Iterable[int | None]) -> list[Sequence]:
        """Takes the tokens of `plan`'s sampling chunks, in order, and gives the sequences that these ended.

        None stands for a token that means nothing (logits were not finite) and ends its sequence with "error".
        Tokens of sequences that have ended since are dropped; those of preempted ones count.
        """
        finished = []
        for (_, sequence), token_id in zip(plan.samples, token_ids, strict=True):
            if sequence.is_finished:
                continue
            if token_id is None:
                sequence.finish_reason = "error"
            else:
                sequence.append(token_id)
            if sequence.finish_reason is not None:
                self._retire(sequence)
                finished.append(sequence)
        return finished

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends a sequence now, waiting or running; one that has ended keeps the reason it has."""
        if not sequence.is_finished:
            sequence.finish_reason = reason
            sequence.stop_reason = stop_reason
            self._retire(sequence)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that hold a slot and pages."""
        return list(self._running.values())

    def preempt_all(self) -> None:
        """Takes all slots and pages back; every sequence waits, to be computed anew."""
        for sequence in self.running:
            self._preempt(sequence)

    def start_over(self, num_pages: int, max_num_batched_tokens: int) -> None:
        """Has everything computed anew, in an empty pool and under a budget of other sizes.

        Tokens in flight are lost, and will be drawn again. The pool must hold each unfinished sequence.
        """
        self.preempt_all()
        for sequence in self._unfinished.values():
            sequence.num_in_flight = 0
        self.allocator = PageAllocator(num_pages)
        self.max_num_batched_tokens = max_num_batched_tokens

    def num_pages_needed(self) -> int:
        """The pages that the longest unfinished sequence may come to need."""
        return max((self._num_pages_for(sequence.max_len - 1) for sequence in self._unfinished.values()), default=1)

    def rewind(self, sequence: Sequence, num_tokens: int) -> None:
        """Takes back the last num_tokens outputs of a sequence without tokens in flight, and the pages behind the rest.

        The newest token that is left goes through the model once more, for the next to be drawn from it.
        """
        assert sequence.num_in_flight == 0 and num_tokens <= len(sequence.output_token_ids)
        del sequence.output_token_ids[len(sequence.output_token_ids) - num_tokens :]
        if sequence.status is SequenceStatus.RUNNING:
            sequence.num_computed = min(sequence.num_computed, sequence.num_known_tokens - 1)
            sequence.prefill_len = sequence.num_known_tokens
            num_pages = self._num_pages_for(sequence.num_computed)
            self.allocator.free(sequence.pages[num_pages:])
            del sequence.pages[num_pages:]

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence that nobody wants any more, at any point of its life."""
        self.finish(sequence, "abort")

    def check(self) -> None:
        """Raises RuntimeError unless each page and each slot is free or has exactly the owners that it counts."""
        self.allocator.check(sequence.pages for sequence in self._running.values())
        slots = [sequence.slot for sequence in self._running.values()] + self._free_slots
        if Counter(slots) != Counter(range(self.max_num_seqs)):
            raise RuntimeError(
                f"running and free slots are {slots}; each of {self.max_num_seqs} slots must be there once"
            )
        waiting = {sequence.sequence_id: sequence for _, sequence in self._waiting if not sequence.is_finished}
        if waiting.keys() ^ self._running.keys() != self._unfinished.keys():
            raise RuntimeError("the running and the waiting sequences together are not the unfinished ones")
        for sequence in self._unfinished.values():
            is_running = sequence.sequence_id in self._running
            expected = SequenceStatus.RUNNING if is_running else SequenceStatus.WAITING
            num_pages = self._num_pages_for(sequence.num_computed)
            if sequence.status is not expected or len(sequence.pages) != num_pages:
                raise RuntimeError(
                    f"sequence {sequence.sequence_id} is {sequence.status.value} with {len(sequence.pages)} pages; "
                    f"it must be {expected.value} with {num_pages} for {sequence.num_computed} computed tokens"
                )

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _enter(self, sequence: Sequence) -> None:
        if sequence.sequence_id in self._unfinished:
            raise ValueError(f"sequence id {sequence.sequence_id} is in use; give every sequence an id of its own")
        self.check_fits(sequence)
        self._unfinished[sequence.sequence_id] = sequence

    def _queue(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        heapq.heappush(self._waiting, (self._key(sequence), sequence))

    def _first_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].is_finished:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _share_budget(self) -> list[tuple[Sequence, int]]:
        """Running sequences and how many tokens of each go into the step, first by policy first.

        Each decoding sequence gets its token, so that a long prompt stops nobody's stream; prompts share the rest.
        There is enough for all decoding ones: each needed a token of the budget, beside the others', to start decoding.
        """
        active = sorted((sequence for sequence in self._running.values() if not sequence.is_full), key=self._key)
        budget = self.max_num_batched_tokens - sum(sequence.is_decoding for sequence in active)
        shares = []
        for sequence in active:
            length = 1
            if not sequence.is_decoding:
                length = min(sequence.prefill_len - sequence.num_computed, budget)
                budget -= length
            if length > 0:
                shares.append((sequence, length))
        return shares

    def _num_new_pages(self, sequence: Sequence, length: int) -> int:
        """Pages to add so that the next `length` tokens of a sequence have a place."""
        return self._num_pages_for(sequence.num_computed + length) - len(sequence.pages)

    def _make_room(self, sequence: Sequence, length: int, plan: StepPlan) -> bool:
        """Preempts the last sequences until the pages of a chunk are free; False if its own sequence had to go."""
        while self._num_new_pages(sequence, length) > self.allocator.num_free:
            victim = max(self._running.values(), key=self._key)
            self._preempt(victim)
            plan.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _append_chunk(self, sequence: Sequence, length: int, plan: StepPlan) -> None:
        assert sequence.slot is not None
        for page in self.allocator.allocate(self._num_new_pages(sequence, length)):
            plan.new_pages.append(NewPage(sequence.slot, len(sequence.pages), page))
            sequence.pages.append(page)
        start = sequence.num_computed
        samples = start + length >= sequence.prefill_len
        plan.chunks.append(Chunk(sequence, start, length, samples, is_decode=start >= sequence.prefill_len))
        sequence.num_computed += length
        sequence.num_in_flight += samples

    def _admit(self, plan: StepPlan) -> None:
        """Starts waiting sequences, strictly in order of policy, while budget, slots and pages last."""
        budget = self.max_num_batched_tokens - plan.num_tokens
        unclaimed: int | None = None  # summed over what runs, so only when somebody can use it
        while budget > 0 and self._free_slots and (sequence := self._first_waiting()):
            if sequence.num_in_flight > 0:
                break  # preempted: all tokens of a prefill come from the host, and some are still to be read
            if unclaimed is None:
                unclaimed = self.allocator.num_free - sum(map(self._claim, self._running.values()))
            unclaimed -= self._claim(sequence)
            if unclaimed < 0:
                break
            heapq.heappop(self._waiting)
            self._start(sequence)
            length = min(sequence.prefill_len, budget)
            self._append_chunk(sequence, length, plan)
            budget -= length

    def _claim(self, sequence: Sequence) -> int:
        """Pages that a sequence will soon want on top of its own: for all tokens so far and one page to grow.

        Admission leaves these free. If it looked at the first chunk alone, a newcomer would be preempted, being the
        last, as soon as its prompt or its neighbours grew, and its prefill would be thrown away.
        """
        num_tokens = min(sequence.num_tokens + self.page_size, sequence.max_len - 1)
        return self._num_pages_for(num_tokens) - len(sequence.pages)

    def _start(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.prefill_len = sequence.num_known_tokens  # the outputs too, after a preemption
        self._running[sequence.sequence_id] = sequence

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed anew; tokens in flight are still good."""
        self._release(sequence)
        self._queue(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _retire(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        sequence.status = SequenceStatus.FINISHED  # a queued one leaves the heap when it comes up
        sequence.num_in_flight = 0
        self._unfinished.pop(sequence.sequence_id, None)

    def _release(self, sequence: Sequence) -> None:
        """Takes slot and pages back. A later step may use them at once: the device runs steps in order."""
        assert sequence.slot is not None
        self.allocator.free(sequence.pages)
        self._free_slots.append(sequence.slot)
        del self._running[sequence.sequence_id]
        sequence.pages = []
        sequence.slot = None
        sequence.num_computed = 0
