"""What runs in the next step: shares the token budget, the slots and the pages among sequences. Plain integers only."""

from collections import Counter, deque
from collections.abc import Iterable

from miniinfer_jax.engine.inheritance import inherited_prefix, place_behind_parent
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import Policy
from miniinfer_jax.engine.prefix_cache import Prefix, PrefixCache
from miniinfer_jax.engine.step_budget import StepBudget
from miniinfer_jax.engine.waiting_queue import WaitingQueue
from miniinfer_jax.sequence import Chunk, NewPage, PageCopy, Sequence, SequenceStatus, StepPlan

PREFETCHES_A_STEP = 16
MAX_PREFETCHES = 256  # new sequences that may queue for it; those beyond are looked up when they start


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
    nothing running the first waiting one always fits. The order may change, but not for ever while no token is computed
    for the first time: policies count those alone.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_pages_per_sequence: int,
        policy: Policy | None = None,
        step_budget: StepBudget | None = None,
        enable_prefix_caching: bool = False,
    ) -> None:
        self.allocator = allocator
        self.prefix_cache = PrefixCache(allocator, page_size, enabled=enable_prefix_caching)
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_pages_per_sequence = max_pages_per_sequence
        self.step_budget = step_budget or StepBudget([max_num_batched_tokens])
        self.num_preemptions = 0
        self.num_planned_tokens = 0
        self.num_prefix_queries = 0  # tokens of the sequences that started
        self.num_prefix_hits = 0  # those of them that were in pages already
        self._policy = policy or Policy()
        self._unfinished: dict[int, Sequence] = {}  # by sequence id, running or waiting
        self._running: dict[int, Sequence] = {}  # by sequence id
        self._waiting = WaitingQueue(self._policy)
        self._newcomers: deque[Sequence] = deque()  # not looked up in the prefix cache yet
        self._filling: list[Sequence] = []  # whose pages the last plan fills, and are not in the prefix cache yet
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
        if sequence.sequence_id in self._unfinished:
            raise ValueError(f"sequence id {sequence.sequence_id} is in use; give every sequence an id of its own")
        self.check_fits(sequence)
        sequence.arrival = self.num_planned_tokens
        self._unfinished[sequence.sequence_id] = sequence
        self._waiting.push(sequence)
        if len(self._newcomers) < MAX_PREFETCHES:
            self._newcomers.append(sequence)

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
        self._cache_pages()
        self.prefix_cache.begin_plan()
        newcomer, num_reserved = self._give_way(plan) if self._policy.preempts else (None, 0)
        num_gave_way = len(plan.preempted)
        decoding, prompts, budget = self._share_budget(newcomer, num_reserved)
        if self._has_pages_for(decoding, prompts, plan):
            self._append_decoding(decoding, plan)
            for sequence, length in prompts:
                self._append_prompt(sequence, length, plan)
        else:
            self._share_pages({**dict.fromkeys(decoding, 1), **dict(prompts)}, plan)
        if len(plan.preempted) == num_gave_way:  # a step that ran out of pages has none for newcomers
            self._admit(plan, budget)
        if plan.copies:
            self.prefix_cache.release([copy.source for copy in plan.copies])  # the next plan may overwrite them
        self.num_planned_tokens += plan.num_tokens
        return plan

    def prefetch(self) -> None:
        """Work for the next plans that is better done while the device is busy with the last one.

        Pages that this one fills enter the prefix cache. New sequences are looked up there, so that it costs little to
        look again when they start, and what was found is evicted last. Pages for the first one waiting are made free.
        """
        self._cache_pages()
        for _ in range(min(len(self._newcomers), PREFETCHES_A_STEP)):
            sequence = self._newcomers.popleft()
            if sequence.status is SequenceStatus.WAITING:
                self.prefix_cache.touch(self.prefix_cache.match(sequence, sequence.max_shared_len).pages)
        if (first := self._waiting.first()) is not None:
            num_shared = len(self.prefix_cache.match(first, first.max_shared_len).pages)
            self.prefix_cache.make_free(self._num_pages_for(first.num_tokens + self.page_size) - num_shared)

    def update(self, plan: StepPlan, token_ids: Iterable[int | None]) -> list[Sequence]:
        """Takes the tokens of `plan`'s sampling chunks, in order, and gives the sequences that these ended.

        None stands for a token that means nothing (logits were not finite) and ends its sequence with "error".
        Tokens of sequences that have ended since are dropped; those of preempted ones count.
        """
        self._cache_pages()
        finished = []
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        for sequence, token_id in zip(sampling, token_ids, strict=True):
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if token_id is None:
                sequence.finish_reason = "error"
                self.prefix_cache.forget(sequence)
            else:
                sequence.append(token_id)
                if (len(sequence.prompt_token_ids) + len(sequence.output_token_ids)) % self.page_size == 0:
                    self.prefix_cache.insert(sequence)
            if sequence.finish_reason is not None:
                self._retire(sequence)
                finished.append(sequence)
        return finished

    def discard(self, plan: StepPlan) -> None:
        """Takes back the last plan, which did not reach the device: its sequences are computed anew, and what it would
        have filled is not cached."""
        self._filling.clear()
        for sequence, samples in [(chunk.sequence, chunk.samples) for chunk in plan.chunks]:
            if sequence.status is SequenceStatus.RUNNING:
                self.prefix_cache.forget(sequence)
                sequence.num_in_flight -= samples
                sequence.num_computed = 0  # nothing to take into the cache
                self._preempt(sequence, plan)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages; False, with nothing changed, while any sequence runs: it may share them."""
        if self._running:
            return False
        self.prefix_cache.clear()
        return True

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends a sequence now, waiting or running; one that has ended keeps the reason it has."""
        if not sequence.is_finished:
            sequence.finish_reason = reason
            sequence.stop_reason = stop_reason
            self._retire(sequence)

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
            num_pages = self._num_pages_for(sequence.num_computed)
            if sequence.status is not expected or len(sequence.pages) != num_pages:
                raise RuntimeError(
                    f"sequence {sequence.sequence_id} is {sequence.status.value} with {len(sequence.pages)} pages; "
                    f"it must be {expected.value} with {num_pages} for {sequence.num_computed} computed tokens"
                )

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _give_way(self, plan: StepPlan) -> tuple[Sequence | None, int]:
        """Preempts what the first waiting sequence outranks, as much as it needs to start.

        Gives that sequence and how many tokens it has to compute, or None if it has nobody behind it or cannot start.
        Nothing is preempted in vain: not for a sequence that would have to wait all the same.
        """
        sequence = self._waiting.first()
        if sequence is None or sequence.num_in_flight > 0:
            return None, 0
        behind = self._policy.outranked(sequence, self._running.values())
        if not behind:
            return None, 0
        num_slots, num_pages = len(self._free_slots), self._num_unclaimed_pages(sequence, plan)
        prefix, claim = self._find_prefix(sequence, plan, False, num_pages)
        num_pages -= claim
        num_decoding = sum(running.is_decoding for running in self._running.values())
        num_tokens = self.max_num_batched_tokens - num_decoding
        victims = []
        while num_slots == 0 or num_tokens == 0 or num_pages < 0:
            if not behind:
                return None, 0
            victims.append(max(behind, key=self._policy.order))
            behind.remove(victims[-1])
            num_slots += 1
            num_tokens += victims[-1].is_decoding
            num_pages += self._claim(victims[-1], plan)
            num_pages += sum(self.allocator.num_references(page) == 1 for page in victims[-1].pages)
        for victim in victims:
            self._preempt(victim, plan)
        return sequence, sequence.num_known_tokens - prefix.num_tokens

    def _share_budget(
        self, newcomer: Sequence | None, num_reserved: int
    ) -> tuple[list[Sequence], list[tuple[Sequence, int]], int]:
        """Who decodes, which prompts go on with how many tokens each, and how many tokens of the step are left.

        Each decoding sequence gets its token, so that a long prompt stops nobody's stream. There is enough for all:
        each needed a token of the budget, beside the others', to start decoding. Prompts share the rest, first by
        policy first; those that `newcomer` outranks leave it `num_reserved` of them.
        """
        decoding, unfilled = [], []
        for sequence in self._running.values():
            if sequence.num_computed < sequence.prefill_len:
                unfilled.append(sequence)
            elif sequence.num_computed + 1 < sequence.max_len:  # else full: the tokens in flight complete it
                decoding.append(sequence)
        num_tokens = min(self.step_budget.num_tokens(len(decoding)), self.max_num_batched_tokens)
        outranked = self._policy.outranked(newcomer, unfilled) if newcomer else []
        budget, shares = num_tokens - len(decoding), []
        for sequence in sorted(unfilled, key=self._policy.order):
            length = min(sequence.prefill_len - sequence.num_computed, budget)
            if sequence in outranked:
                length = min(length, budget - num_reserved)
            if length > 0:
                budget -= length
                shares.append((sequence, length))
        return decoding, shares, budget

    def _has_pages_for(self, decoding: list[Sequence], prompts: list[tuple[Sequence, int]], plan: StepPlan) -> bool:
        """Whether all of these can have the pages they want, looked at closely only when there are few."""
        num_left = self.prefix_cache.num_available
        num_left -= sum(self._num_wanted(sequence, length, plan) for sequence, length in prompts)
        return (
            len(decoding) <= num_left or sum(self._num_wanted(sequence, 1, plan) for sequence in decoding) <= num_left
        )

    def _num_wanted(self, sequence: Sequence, length: int, plan: StepPlan) -> int:
        """Pages that the next `length` tokens of a sequence take out of the pool."""
        return self._num_new_pages(sequence, length) + self._must_copy(sequence, plan)

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

    def _share_pages(self, lengths: dict[Sequence, int], plan: StepPlan) -> None:
        """Appends chunks of these lengths while pages are too few: the last sequences by policy lose theirs.

        The order is that of before the step, for a chunk may move its sequence: what has one keeps its pages.
        """
        line = sorted(self._running.values(), key=self._policy.order)
        for sequence in line.copy():
            if sequence in lengths and self._make_room(sequence, lengths[sequence], line, plan):
                if sequence.is_decoding:
                    self._append_decoding([sequence], plan)
                else:
                    self._append_prompt(sequence, lengths[sequence], plan)

    def _make_room(self, sequence: Sequence, length: int, line: list[Sequence], plan: StepPlan) -> bool:
        """Preempts from the line's end until a chunk can have its pages; False if its own sequence had to go."""
        while sequence.status is SequenceStatus.RUNNING:
            if self._num_wanted(sequence, length, plan) <= self.prefix_cache.num_available:
                return True
            self._preempt(line.pop(), plan)
        return False

    def _append_decoding(self, sequences: list[Sequence], plan: StepPlan) -> None:
        """A chunk of one token for each, whose pages can be had: the scheduler spends most of its time here."""
        page_size, chunks = self.page_size, plan.chunks
        for sequence in sequences:
            start = sequence.num_computed
            offset = start % page_size
            if offset == 0 or offset == page_size - 1 or sequence.may_share_part:
                self._append_chunk(sequence, 1, plan)
                continue
            chunks.append(Chunk(sequence, start, 1, True, True))
            sequence.num_computed = start + 1
            sequence.num_in_flight += 1
            sequence.last_chunk_start = start
        self._policy.on_decoding(sequences)

    def _append_prompt(self, sequence: Sequence, length: int, plan: StepPlan, place: int | None = None) -> None:
        self._append_chunk(sequence, length, plan, place)
        self._policy.on_prompt(sequence)

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
            self._filling.append(sequence)

    def _cache_pages(self) -> None:
        for sequence in self._filling:
            self.prefix_cache.insert(sequence)
        self._filling.clear()

    def _copy_page(self, source: int, plan: StepPlan) -> int:
        """A new page, filled from `source` before the step; the caller's reference to the source goes to the plan."""
        [target] = self.prefix_cache.allocate(1)
        plan.copies.append(PageCopy(source, target))
        return target

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Starts waiting sequences, strictly in order of policy, while budget, slots and pages last."""
        unclaimed: int | None = None  # summed over what runs, so only when somebody can use it
        while self._free_slots and len(plan.chunks) < self.max_num_batched_tokens:
            sequence = self._waiting.first()
            if sequence is None or sequence.num_in_flight > 0:
                break  # preempted: all tokens of a prefill come from the host, and some are still to be read
            place = place_behind_parent(sequence, plan)
            if budget == 0 and place is None:
                break
            if unclaimed is None:
                unclaimed = self._num_unclaimed_pages(sequence, plan)
            self._cache_pages()  # of the sequences that start before it in the same plan
            prefix, claim = self._find_prefix(sequence, plan, place is not None, unclaimed)
            if claim > unclaimed:
                break
            length = min(sequence.num_known_tokens - prefix.num_tokens, budget)
            self._waiting.pop()
            self._start(sequence, prefix, plan)
            self._append_prompt(sequence, length, plan, place)
            unclaimed -= claim
            budget -= length

    def _num_unclaimed_pages(self, newcomer: Sequence, plan: StepPlan) -> int:
        """Pages that no running sequence will soon want, or some of them where that is plenty for `newcomer`."""
        num_available, running = self.prefix_cache.num_available, self._running.values()
        # A sequence that decodes claims the next two pages and a copy at most.
        prompts = [sequence for sequence in running if sequence.num_computed < sequence.prefill_len]
        num_left = num_available - 3 * len(running) - sum(self._claim(sequence, plan) for sequence in prompts)
        if num_left > self._num_pages_for(newcomer.num_tokens + self.page_size):
            return num_left
        return num_available - sum(self._claim(sequence, plan) for sequence in running)

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
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.prefill_len = sequence.num_known_tokens  # the outputs too, after a preemption
        sequence.prefill_start = sequence.num_computed = prefix.num_tokens
        # What others computed is free, and what was decoded is paid for: all but the last token was computed.
        num_decoded = sequence.num_known_tokens - 1 if sequence.output_token_ids else 0
        sequence.num_charged = max(sequence.num_charged, prefix.num_tokens, num_decoded)
        sequence.parent = None
        self._running[sequence.sequence_id] = sequence
        self.prefix_cache.share(prefix.pages)
        sequence.pages = list(prefix.pages)
        if prefix.part_page is not None:
            self.prefix_cache.share([prefix.part_page])
            sequence.pages.append(self._copy_page(prefix.part_page, plan))
        plan.shared_pages += [NewPage(sequence.slot, column, page) for column, page in enumerate(sequence.pages)]
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = min(prefix.num_tokens, sequence.prompt_len)
            self.num_prefix_queries += sequence.prefill_len
            self.num_prefix_hits += prefix.num_tokens

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
        if sequence.finish_reason != "error":
            self.prefix_cache.insert(sequence)
        self.prefix_cache.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        del self._running[sequence.sequence_id]
        sequence.pages = []
        sequence.slot = None
        sequence.num_computed = 0
        sequence.may_share_part = False
