"""What runs in the next step: shares the token budget, the slots and the pages among sequences. Plain integers only."""

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Any

from miniinfer_jax.engine.host_pages import HostPages
from miniinfer_jax.engine.inheritance import inherited_prefix, place_behind_parent
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import POLICIES
from miniinfer_jax.engine.prefix_cache import Prefix, PrefixCache
from miniinfer_jax.sequence import Chunk, HostCopy, NewPage, PageCopy, Sequence, SequenceStatus, StepPlan


class Scheduler:
    """Continuous batching with chunked prefill, over one page pool.

    The engine runs one step ahead of the device, so `schedule` may be called again before the tokens of the
    steps before are read: it counts a step as done when it plans it. `update` then takes the tokens, step by step
    in the order of the plans.

    The pages of the pool, and what a running sequence holds of them (one slot, one row of the page table):

        [ free | cached | shared by several | sequence in slot 0 | ... ]     pages_for(num_computed) pages each

    A page is shared as long as it is full, or nobody writes to it: who writes to a shared page gets a copy. Cached
    pages are as good as free ones.
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
        enable_prefix_caching: bool = False,
        num_host_pages: int = 0,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"scheduling policy {policy!r} is not known; known: {', '.join(POLICIES)}")
        self.allocator = allocator
        host_pages = HostPages(num_host_pages)
        self.prefix_cache = PrefixCache(allocator, page_size, enabled=enable_prefix_caching, host_pages=host_pages)
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_pages_per_sequence = max_pages_per_sequence
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens of the sequences that started
        self.num_prefix_hits = 0  # those of them that were in pages already
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

    def resume(self, sequence: Sequence, num_computed: int) -> int | None:
        """Takes a sequence whose first num_computed tokens have keys and values outside of the pool.

        It runs, and the caller fills its pages before the next step, but for the first ones, whose number is given:
        they hold their tokens already. None: there is no room, it waits and will be computed anew. Raises ValueError
        as `add` does.
        """
        self._enter(sequence)
        found = self.prefix_cache.match(sequence, num_computed).without_part(self.page_size)
        num_pages = self._num_pages_for(min(sequence.num_tokens + self.page_size, sequence.max_len - 1))
        claimed = num_pages - len(found.pages) + self.prefix_cache.num_idle(found.pages)
        claimed += sum(self._claim(one, StepPlan()) for one in self.running)
        if num_computed == 0 or not self._free_slots or claimed > self.prefix_cache.num_available:
            self._queue(sequence)
            return None
        self._take_slot(sequence)
        self.prefix_cache.share(found.pages)
        new_pages = self.prefix_cache.allocate(self._num_pages_for(num_computed) - len(found.pages))
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
        self.prefix_cache.begin_plan()
        for sequence, length in self._share_budget():
            # Sequences come first by policy first and are preempted last first: what has a chunk keeps its pages.
            if sequence.status is SequenceStatus.RUNNING and self._make_room(sequence, length, plan):
                self._append_chunk(sequence, length, plan)
        if not plan.preempted:  # a step that ran out of pages has none for newcomers
            self._admit(plan)
        plan.offloads = self.prefix_cache.take_offloads()
        if plan.copies:
            self.prefix_cache.release([copy.source for copy in plan.copies])  # the next plan may overwrite them
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
                self.prefix_cache.forget(sequence)
            else:
                sequence.append(token_id)
                if sequence.num_known_tokens % self.page_size == 0:
                    self.prefix_cache.insert(sequence)
            if sequence.finish_reason is not None:
                self._retire(sequence)
                finished.append(sequence)
        return finished

    def discard(self, plan: StepPlan) -> None:
        """Takes back the last plan, which did not reach the device: its sequences are computed anew, and what it would
        have filled, here or in host memory, is not cached."""
        self.prefix_cache.host_pages.drop_fresh()
        for sequence, samples in [(chunk.sequence, chunk.samples) for chunk in plan.chunks]:
            if sequence.status is SequenceStatus.RUNNING:
                self.prefix_cache.forget(sequence)
                sequence.num_in_flight -= samples
                sequence.num_computed = 0  # nothing to take into the cache
                self._preempt(sequence)

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
            self._preempt(sequence)
        self.prefix_cache.clear()

    def start_over(self, num_pages: int, max_num_batched_tokens: int) -> None:
        """Has everything computed anew, in an empty pool and under a budget of other sizes.

        Tokens in flight are lost, and will be drawn again. The pool must hold each unfinished sequence.
        """
        self.preempt_all()
        for sequence in self._unfinished.values():
            sequence.num_in_flight = 0
        self._free_slots.sort(reverse=True)  # in whichever order they came back: a replay goes the same way
        self.allocator = PageAllocator(num_pages)
        self.prefix_cache = self.prefix_cache.empty(self.allocator)
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
            num_computed = min(sequence.num_computed, sequence.num_known_tokens - 1)
            sequence.prefill_start = sequence.last_chunk_start = sequence.num_computed = num_computed
            sequence.prefill_len = sequence.num_known_tokens
            num_pages = self._num_pages_for(num_computed)
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

    def _must_copy(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Whether the page that a sequence writes to next holds tokens that others, or the cache, count on too."""
        if not sequence.may_share_part or sequence.num_computed % self.page_size == 0:
            return False
        page = sequence.pages[sequence.num_computed // self.page_size]
        num_owners = self.allocator.num_references(page) + self.allocator.is_kept(page)
        return num_owners > 1 and num_owners - sum(copy.source == page for copy in plan.copies) > 1

    def _make_room(self, sequence: Sequence, length: int, plan: StepPlan) -> bool:
        """Preempts the last sequences until the pages of a chunk can be had; False if its own sequence had to go."""
        while self._num_new_pages(sequence, length) + self._must_copy(sequence, plan) > self.prefix_cache.num_available:
            victim = max(self._running.values(), key=self._key)
            self._preempt(victim)
            plan.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _append_chunk(self, sequence: Sequence, length: int, plan: StepPlan, place: int | None = None) -> None:
        """Plans the next `length` tokens of a sequence, behind the other chunks or at `place`."""
        assert sequence.slot is not None
        start = sequence.num_computed
        if length and sequence.may_share_part:
            if self._must_copy(sequence, plan):
                column = start // self.page_size
                sequence.pages[column] = self._copy_page(sequence.pages[column], plan)
                plan.new_pages.append(NewPage(sequence.slot, column, sequence.pages[column]))
            sequence.may_share_part = False
        for page in self.prefix_cache.allocate(self._num_new_pages(sequence, length)):
            plan.new_pages.append(NewPage(sequence.slot, len(sequence.pages), page))
            sequence.pages.append(page)
        samples = start + length >= sequence.prefill_len
        is_decode = length > 0 and start >= sequence.prefill_len
        is_first = not is_decode and start == sequence.prefill_start
        chunk = Chunk(sequence, start, length, samples, is_decode, is_first)
        plan.chunks.insert(len(plan.chunks) if place is None else place, chunk)
        sequence.num_computed += length
        sequence.num_in_flight += samples
        sequence.last_chunk_start = start
        if length > 1 or sequence.num_computed % self.page_size == 0:
            self.prefix_cache.insert(sequence)

    def _copy_page(self, source: int, plan: StepPlan) -> int:
        """A new page, filled from `source` before the step; the caller's reference to the source goes to the plan."""
        [target] = self.prefix_cache.allocate(1)
        plan.copies.append(PageCopy(source, target))
        return target

    def _admit(self, plan: StepPlan) -> None:
        """Starts waiting sequences, strictly in order of policy, while budget, slots and pages last."""
        budget = self.max_num_batched_tokens - plan.num_tokens
        unclaimed: int | None = None  # summed over what runs, so only when somebody can use it
        while self._free_slots and len(plan.chunks) < self.max_num_batched_tokens:
            sequence = self._first_waiting()
            if sequence is None or sequence.num_in_flight > 0:
                break  # preempted: all tokens of a prefill come from the host, and some are still to be read
            place = place_behind_parent(sequence, plan)
            if budget == 0 and place is None:
                break
            if unclaimed is None:
                unclaimed = self.prefix_cache.num_available - sum(self._claim(s, plan) for s in self._running.values())
            prefix, claim = self._find_prefix(sequence, plan, place is not None, unclaimed)
            if claim > unclaimed:
                break
            length = min(sequence.num_known_tokens - prefix.num_tokens, budget)
            heapq.heappop(self._waiting)
            self._start(sequence, prefix, plan)
            self._append_chunk(sequence, length, plan, place)
            unclaimed -= claim
            budget -= length

    def _find_prefix(
        self, sequence: Sequence, plan: StepPlan, draws_with_parent: bool, unclaimed: int
    ) -> tuple[Prefix, int]:
        """What is computed of a waiting sequence's tokens, and the pages of its start and its claim that are not.

        Pages that nobody runs with cost as much as new ones: sharing them, or holding one for a copy, keeps them from
        being evicted.
        """
        num_pages = self._num_pages_for(min(sequence.num_tokens + self.page_size, sequence.max_len - 1))
        if draws_with_parent:
            assert sequence.parent is not None
            self.prefix_cache.join(sequence, sequence.parent)
            sequence.may_share_part = sequence.parent.may_share_part = True
            prefix = Prefix(list(sequence.parent.pages), sequence.num_known_tokens)
            is_part_filled = prefix.num_tokens % self.page_size > 0
            return prefix, num_pages - len(prefix.pages) + is_part_filled
        found = self.prefix_cache.match(sequence, sequence.max_shared_len)
        inherited = inherited_prefix(sequence, plan, self.page_size)
        prefix = inherited if inherited.num_tokens > found.num_tokens else found
        claim = num_pages - len(prefix.pages) + self.prefix_cache.num_idle(prefix.pages)
        if prefix.part_page is not None:
            num_held = self.prefix_cache.num_idle([prefix.part_page])
            if claim + num_held <= unclaimed:
                return prefix, claim + num_held
            prefix = prefix.without_part(self.page_size)
        return prefix, claim

    def _claim(self, sequence: Sequence, plan: StepPlan) -> int:
        """Pages that a sequence will soon want on top of its own: for all tokens so far and one page to grow.

        Admission leaves these free. If it looked at the first chunk alone, a newcomer would be preempted, being the
        last, as soon as its prompt or its neighbours grew, and its prefill would be thrown away.
        """
        num_tokens = min(sequence.num_tokens + self.page_size, sequence.max_len - 1)
        return self._num_pages_for(num_tokens) - len(sequence.pages) + self._must_copy(sequence, plan)

    def _start(self, sequence: Sequence, prefix: Prefix, plan: StepPlan) -> None:
        """Gives a waiting sequence a slot, and the pages of its prefix."""
        slot = self._take_slot(sequence)
        sequence.prefill_start = sequence.num_computed = prefix.num_tokens
        self.prefix_cache.share(prefix.pages)
        sequence.pages = list(prefix.pages)
        for place in prefix.host_places:
            [page] = self.prefix_cache.allocate(1)
            plan.loads.append(HostCopy(page, place))
            sequence.pages.append(page)
        self.prefix_cache.host_pages.num_loads += len(prefix.host_places)
        if prefix.part_page is not None:
            self.prefix_cache.share([prefix.part_page])
            sequence.pages.append(self._copy_page(prefix.part_page, plan))
        plan.shared_pages += [NewPage(slot, column, page) for column, page in enumerate(sequence.pages)]
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = min(prefix.num_tokens, sequence.prompt_len)
            self.num_prefix_queries += sequence.prefill_len
            self.num_prefix_hits += prefix.num_tokens

    def _take_slot(self, sequence: Sequence) -> int:
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = slot = self._free_slots.pop()
        sequence.prefill_len = sequence.num_known_tokens  # the outputs too, after a preemption
        sequence.parent = None
        self._running[sequence.sequence_id] = sequence
        return slot

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed anew; tokens in flight are still good."""
        self._release(sequence)
        self._queue(sequence)
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
        if sequence.finish_reason != "error":
            self.prefix_cache.insert(sequence)
        self.prefix_cache.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        del self._running[sequence.sequence_id]
        sequence.pages = []
        sequence.slot = None
        sequence.num_computed = 0
        sequence.may_share_part = False
