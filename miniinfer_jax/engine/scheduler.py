"""What runs in the next step: shares the token budget, the slots and the pages among sequences. Plain integers only."""

from collections import deque
from collections.abc import Iterable

from miniinfer_jax.engine.inheritance import place_behind_parent
from miniinfer_jax.engine.lifecycle import Lifecycle
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import Policy
from miniinfer_jax.engine.prefix_cache import Prefix
from miniinfer_jax.engine.sequence_pages import SequencePages
from miniinfer_jax.engine.step_budget import StepBudget
from miniinfer_jax.sequence import Chunk, Sequence, SequenceStatus, StepPlan

PREFETCHES_A_STEP = 16
MAX_PREFETCHES = 256  # new sequences that may queue for it; those beyond are looked up when they start


class Scheduler(Lifecycle):
    """Continuous batching with chunked prefill, over one page pool.

    The engine runs one step ahead of the device, so `schedule` may be called again before the tokens of the
    steps before are read: it counts a step as done when it plans it. `update` then takes the tokens, step by step
    in the order of the plans.

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
        num_host_pages: int = 0,
    ) -> None:
        pages = SequencePages(
            allocator, page_size, enable_prefix_caching=enable_prefix_caching, num_host_pages=num_host_pages
        )
        super().__init__(
            pages, policy or Policy(), max_num_seqs=max_num_seqs, max_pages_per_sequence=max_pages_per_sequence
        )
        self.max_num_batched_tokens = max_num_batched_tokens
        self.step_budget = step_budget or StepBudget([max_num_batched_tokens])
        self.num_prefix_queries = 0  # tokens of the sequences that started
        self.num_prefix_hits = 0  # those of them that were in pages already
        self._newcomers: deque[Sequence] = deque()  # not looked up in the prefix cache yet

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence. Raises ValueError if it could never be computed, even alone in the pool."""
        super().add(sequence)
        if len(self._newcomers) < MAX_PREFETCHES:
            self._newcomers.append(sequence)

    def schedule(self) -> StepPlan:
        """The next step, counted as done: running sequences first, then as many waiting ones as fit.

        The plan is empty when nothing waits, or when everything waits for tokens to be read by `update`.
        """
        plan = StepPlan()
        self.pages.cache_filled()
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
        plan.offloads = self.prefix_cache.take_offloads()
        if plan.copies:
            self.prefix_cache.release([copy.source for copy in plan.copies])  # the next plan may overwrite them
        self.num_planned_tokens += plan.num_tokens
        return plan

    def prefetch(self) -> None:
        """Work for the next plans that is better done while the device is busy with the last one.

        Pages that this one fills enter the prefix cache. New sequences are looked up there, so that it costs little to
        look again when they start, and what was found is evicted last. Pages for the first one waiting are made free.
        """
        self.pages.cache_filled()
        for _ in range(min(len(self._newcomers), PREFETCHES_A_STEP)):
            sequence = self._newcomers.popleft()
            if sequence.status is SequenceStatus.WAITING:
                self.prefix_cache.touch(self.prefix_cache.match(sequence, sequence.max_shared_len).pages)
        if (first := self._waiting.first()) is not None:
            num_shared = len(self.prefix_cache.match(first, first.max_shared_len).pages)
            self.prefix_cache.make_free(self.pages.num_pages_for(first.num_tokens + self.page_size) - num_shared)

    def update(self, plan: StepPlan, token_ids: Iterable[int | None]) -> list[Sequence]:
        """Takes the tokens of `plan`'s sampling chunks, in order, and gives the sequences that these ended.

        None stands for a token that means nothing (logits were not finite) and ends its sequence with "error".
        Tokens of sequences that have ended since are dropped; those of preempted ones count.
        """
        self.pages.cache_filled()
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
        have filled, here or in host memory, is not cached."""
        self.pages.forget_filling()
        self.prefix_cache.host_pages.drop_fresh()
        for sequence, samples in [(chunk.sequence, chunk.samples) for chunk in plan.chunks]:
            if sequence.status is SequenceStatus.RUNNING:
                self.prefix_cache.forget(sequence)
                sequence.num_in_flight -= samples
                sequence.num_computed = 0  # nothing to take into the cache
                self._preempt(sequence, plan)

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
        num_slots, num_pages = len(self._free_slots), self.pages.num_unclaimed(sequence, self._running.values(), plan)
        prefix, claim = self.pages.find_prefix(sequence, plan, False, num_pages)
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
            num_pages += self.pages.claim(victims[-1], plan)
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
        num_left -= sum(self.pages.num_wanted(sequence, length, plan) for sequence, length in prompts)
        return (
            len(decoding) <= num_left
            or sum(self.pages.num_wanted(sequence, 1, plan) for sequence in decoding) <= num_left
        )

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
            if self.pages.num_wanted(sequence, length, plan) <= self.prefix_cache.num_available:
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
        self.pages.extend(sequence, length, plan)
        samples = start + length >= sequence.prefill_len
        is_decode = length > 0 and start >= sequence.prefill_len
        is_first = not is_decode and start == sequence.prefill_start
        chunk = Chunk(sequence, start, length, samples, is_decode, is_first)
        plan.chunks.insert(len(plan.chunks) if place is None else place, chunk)
        sequence.num_computed += length
        sequence.num_in_flight += samples
        sequence.last_chunk_start = start
        self.pages.note_computed(sequence, length)

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
                unclaimed = self.pages.num_unclaimed(sequence, self._running.values(), plan)
            self.pages.cache_filled()  # of the sequences that start before it in the same plan
            prefix, claim = self.pages.find_prefix(sequence, plan, place is not None, unclaimed)
            if claim > unclaimed:
                break
            length = min(sequence.num_known_tokens - prefix.num_tokens, budget)
            self._waiting.pop()
            self._start(sequence, prefix, plan)
            self._append_prompt(sequence, length, plan, place)
            unclaimed -= claim
            budget -= length

    def _start(self, sequence: Sequence, prefix: Prefix, plan: StepPlan) -> None:
        """Gives a waiting sequence a slot, and the pages of its prefix."""
        self._take_slot(sequence)
        sequence.prefill_start = sequence.num_computed = prefix.num_tokens
        # What others computed is free, and what was decoded is paid for: all but the last token was computed.
        num_decoded = sequence.num_known_tokens - 1 if sequence.output_token_ids else 0
        sequence.num_charged = max(sequence.num_charged, prefix.num_tokens, num_decoded)
        self.pages.take_prefix(sequence, prefix, plan)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = min(prefix.num_tokens, sequence.prompt_len)
            self.num_prefix_queries += sequence.prefill_len
            self.num_prefix_hits += prefix.num_tokens
