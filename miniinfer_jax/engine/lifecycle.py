"""Which sequences wait and run, with their slots and pages, and how they come and go. Plain integers only."""

from collections import Counter

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import Policy
from miniinfer_jax.engine.prefix_cache import PrefixCache
from miniinfer_jax.engine.sequence_pages import SequencePages
from miniinfer_jax.engine.waiting_queue import WaitingQueue
from miniinfer_jax.sequence import Sequence, SequenceStatus, StepPlan


class Lifecycle:
    """The sequences of an engine, from their arrival to their end: WAITING -> RUNNING (-> WAITING ...) -> FINISHED.

    A running sequence holds a slot and pages, a waiting one neither.
    """

    def __init__(self, pages: SequencePages, policy: Policy, *, max_num_seqs: int, max_pages_per_sequence: int) -> None:
        self.pages = pages
        self.page_size = pages.page_size
        self.max_num_seqs = max_num_seqs
        self.max_pages_per_sequence = max_pages_per_sequence
        self.num_preemptions = 0
        self.num_planned_tokens = 0
        self._policy = policy
        self._unfinished: dict[int, Sequence] = {}  # by sequence id, running or waiting
        self._running: dict[int, Sequence] = {}  # by sequence id
        self._waiting = WaitingQueue(policy)
        self._free_slots = list(reversed(range(max_num_seqs)))

    @property
    def allocator(self) -> PageAllocator:
        return self.pages.allocator

    @property
    def prefix_cache(self) -> PrefixCache:
        return self.pages.prefix_cache

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
        self._waiting.push(sequence)

    def resume(self, sequence: Sequence, num_computed: int) -> int | None:
        """Takes a sequence whose first num_computed tokens have keys and values outside of the pool.

        It runs, and the caller fills its pages before the next step, but for the first ones, whose number is given:
        they hold their tokens already. None: there is no room, it waits and will be computed anew. Raises ValueError
        as `add` does.
        """
        self._enter(sequence)
        found = self.prefix_cache.match(sequence, num_computed).without_part(self.page_size)
        num_pages = self.pages.num_pages_for(min(sequence.num_tokens + self.page_size, sequence.max_len - 1))
        claimed = num_pages - len(found.pages) + self.prefix_cache.num_idle(found.pages)
        claimed += sum(self.pages.claim(one, StepPlan()) for one in self.running)
        if num_computed == 0 or not self._free_slots or claimed > self.prefix_cache.num_available:
            self._waiting.push(sequence)
            return None
        self._take_slot(sequence)
        self.prefix_cache.share(found.pages)
        new_pages = self.prefix_cache.allocate(self.pages.num_pages_for(num_computed) - len(found.pages))
        sequence.pages = [*found.pages, *new_pages]
        sequence.prefill_start = sequence.last_chunk_start = sequence.num_computed = num_computed
        self.prefix_cache.insert(sequence)
        return len(found.pages)

    def check_fits(self, sequence: Sequence) -> None:
        """Raises ValueError, with what to raise and by how much, for a sequence too long for the whole pool."""
        if not 0 < sequence.prompt_len < sequence.max_len:
            raise ValueError(
                f"the prompt has {sequence.prompt_len} tokens of at most {sequence.max_len} for prompt and output; "
                "it needs at least 1, and room for 1 more: shorten it, or raise max_model_len"
            )
        needed = self.pages.num_pages_for(sequence.max_len - 1)  # the last token drawn is never computed
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

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages; False, with nothing changed, while any sequence runs: it may share them."""
        if self._running:
            return False
        self.prefix_cache.clear()
        self.prefix_cache.host_pages.clear()
        return True

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
        """Takes all slots and pages back, and forgets what pages hold; every sequence waits, to be computed anew."""
        for sequence in self.running:
            self._preempt(sequence, StepPlan())
        self.pages.forget_filling()
        self.prefix_cache.clear()

    def start_over(self, num_pages: int) -> None:
        """Has everything computed anew, in an empty pool of another size.

        Tokens in flight are lost, and will be drawn again. The pool must hold each unfinished sequence.
        """
        self.preempt_all()
        for sequence in self._unfinished.values():
            sequence.num_in_flight = 0
        self._free_slots.sort(reverse=True)  # in whichever order they came back: a replay goes the same way
        self.pages.start_over(num_pages)

    def num_pages_needed(self) -> int:
        """The pages that the longest unfinished sequence may come to need."""
        return max(
            (self.pages.num_pages_for(sequence.max_len - 1) for sequence in self._unfinished.values()), default=1
        )

    def rewind(self, sequence: Sequence, num_tokens: int) -> None:
        """Takes back the last num_tokens outputs of a sequence without tokens in flight, and the pages behind the rest.

        The newest token that is left goes through the model once more, for the next to be drawn from it.
        """
        assert sequence.num_in_flight == 0 and num_tokens <= len(sequence.output_token_ids)
        del sequence.output_token_ids[len(sequence.output_token_ids) - num_tokens :]
        if sequence.status is SequenceStatus.RUNNING:
            num_computed = min(sequence.num_computed, sequence.num_known_tokens - 1)
            sequence.prefill_start = sequence.last_chunk_start = sequence.num_computed = num_computed
            sequence.prefill_len = sequence.num_known_tokens
            num_pages = self.pages.num_pages_for(num_computed)
            self.prefix_cache.release(sequence.pages[num_pages:])
            del sequence.pages[num_pages:]
            sequence.may_share_part = True  # what was full may be in the cache, and is written to again
        self.prefix_cache.leave(sequence)  # its place may be among tokens that it has no more

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence that nobody wants any more, at any point of its life."""
        self.finish(sequence, "abort")

    def check(self) -> None:
        """Raises RuntimeError unless each page and each slot is free or has exactly the owners that it counts."""
        self.prefix_cache.check(sequence.pages for sequence in self._running.values())
        slots = [sequence.slot for sequence in self._running.values()] + self._free_slots
        if Counter(slots) != Counter(range(self.max_num_seqs)):
            raise RuntimeError(
                f"running and free slots are {slots}; each of {self.max_num_seqs} slots must be there once"
            )
        waiting = sorted(sequence.sequence_id for sequence in self._waiting)
        if sorted([*waiting, *self._running]) != sorted(self._unfinished):
            raise RuntimeError("the running and the waiting sequences together are not the unfinished ones")
        for sequence in self._unfinished.values():
            is_running = sequence.sequence_id in self._running
            expected = SequenceStatus.RUNNING if is_running else SequenceStatus.WAITING
            num_pages = self.pages.num_pages_for(sequence.num_computed)
            if sequence.status is not expected or len(sequence.pages) != num_pages:
                raise RuntimeError(
                    f"sequence {sequence.sequence_id} is {sequence.status.value} with {len(sequence.pages)} pages; "
                    f"it must be {expected.value} with {num_pages} for {sequence.num_computed} computed tokens"
                )

    def _enter(self, sequence: Sequence) -> None:
        if sequence.sequence_id in self._unfinished:
            raise ValueError(f"sequence id {sequence.sequence_id} is in use; give every sequence an id of its own")
        self.check_fits(sequence)
        sequence.arrival = self.num_planned_tokens
        sequence.status = SequenceStatus.WAITING
        self._unfinished[sequence.sequence_id] = sequence

    def _take_slot(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.prefill_len = sequence.num_known_tokens  # the outputs too, after a preemption
        sequence.parent = None
        self._running[sequence.sequence_id] = sequence

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        """Back to the queue, to be computed anew; tokens in flight are still good."""
        plan.preempted.append(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        self._waiting.push(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _retire(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        self.prefix_cache.leave(sequence)
        sequence.status = SequenceStatus.FINISHED  # a queued one leaves the heap when it comes up
        sequence.parent = None
        sequence.num_in_flight = 0
        self._unfinished.pop(sequence.sequence_id, None)

    def _release(self, sequence: Sequence) -> None:
        """Takes slot and pages back. A later step may use them at once: the device runs steps in order."""
        assert sequence.slot is not None
        self.pages.give_back(sequence, caches=sequence.finish_reason != "error")
        self._free_slots.append(sequence.slot)
        del self._running[sequence.sequence_id]
        sequence.slot = None
        sequence.num_computed = 0
