"""Random lives of an engine: the scheduler, up to two steps ahead of a simulated device, under every event there is.

Prompts begin alike, go on from what others said, and are continued several times, under two salts.
"""

from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import POLICIES, Policy, make_policy
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.engine.step_budget import StepBudget
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence, StepPlan
from tests.engine.fake_device import EOS, STOP_TOKEN, VOCAB_SIZE, FakeDevice, expected_outputs

SMALL_QUANTA = {"multi_queue": {"quantum": 8, "num_levels": 3, "boost_interval": 300}}


class NewestFirst(Policy):
    def key(self, sequence: Sequence) -> int:
        return -sequence.sequence_id


def policy_named(name: str) -> Policy:
    return NewestFirst() if name == "newest_first" else make_policy(name, SMALL_QUANTA.get(name))


class EngineMachine(RuleBasedStateMachine):
    """The engine loop, taken apart into rules: dispatch a step, read the oldest one, and what users do meanwhile."""

    policy: str
    num_events: Counter[str]  # over all examples: proves that everything did happen

    @initialize(
        page_size=st.integers(1, 5),
        num_pages=st.integers(4, 24),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 32),
        max_pending=st.integers(1, 3),
        target_seconds=st.sampled_from([None, 1.0]),
        enable_prefix_caching=st.sampled_from([True, True, False]),
        num_host_pages=st.sampled_from([0, 2, 12]),
    )
    def start(
        self,
        page_size: int,
        num_pages: int,
        max_num_seqs: int,
        budget: int,
        max_pending: int,
        target_seconds: float | None,
        enable_prefix_caching: bool,
        num_host_pages: int,
    ) -> None:
        self.scheduler = Scheduler(
            PageAllocator(num_pages),
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_pages_per_sequence=num_pages,
            policy=policy_named(self.policy),
            step_budget=StepBudget([size for size in (2, 6, 16) if size < budget] + [budget], target_seconds),
            enable_prefix_caching=enable_prefix_caching,
            num_host_pages=num_host_pages if enable_prefix_caching else 0,
        )
        self.max_pending = max_pending  # plans whose tokens are not read yet; the engine itself has two at most
        self.device = FakeDevice(page_size)
        self.sequences: list[Sequence] = []
        self.pending: deque[tuple[StepPlan, list[int]]] = deque()
        self.num_computed: Counter[int] = Counter()  # by sequence id, as the chunks add up
        self.num_scored: dict[Sequence, int] = {}  # prompt tokens, of sequences that want all of them scored

    @rule(
        family=st.integers(0, 2),
        common_len=st.integers(0, 20),
        own_len=st.integers(0, 8),
        max_tokens=st.integers(1, 40),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        seed=st.integers(0, 1000),
        num_samples=st.sampled_from([1, 1, 1, 2, 4]),
        salt=st.sampled_from([None, None, "tenant"]),
        scores_prompt=st.sampled_from([False, False, False, True]),
    )
    def add(
        self,
        family: int,
        common_len: int,
        own_len: int,
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        seed: int,
        num_samples: int,
        salt: str | None,
        scores_prompt: bool,
    ) -> None:
        """Requests of a family begin alike."""
        common = [VOCAB_SIZE + 100 * family + position for position in range(common_len)]
        prompt = [*common, *(1000 + seed + position for position in range(own_len))] or [VOCAB_SIZE]
        min_tokens = min(min_tokens, max_tokens)
        params = SamplingParams(min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=[STOP_TOKEN])
        self.add_samples(prompt, max_tokens, params, seed, num_samples, salt, scores_prompt)

    @precondition(lambda self: any(sequence.is_finished for sequence in self.sequences))
    @rule(index=st.integers(0, 11), own_len=st.integers(0, 4), max_tokens=st.integers(1, 12), seed=st.integers(0, 1000))
    def go_on_talking(self, index: int, own_len: int, max_tokens: int, seed: int) -> None:
        """The next turn of a chat: all that was said before, and something new."""
        finished = [sequence for sequence in self.sequences if sequence.is_finished]
        before = finished[-1 - index % len(finished)]
        prompt = before.token_ids + [1000 + seed + position for position in range(own_len)]
        self.num_events["second turn"] += 1
        params = SamplingParams(stop_token_ids=[STOP_TOKEN])
        self.add_samples(prompt, max_tokens, params, seed, 1, before.cache_salt, scores_prompt=False)

    def add_samples(
        self,
        prompt: list[int],
        max_tokens: int,
        params: SamplingParams,
        seed: int,
        num_samples: int,
        salt: str | None,
        scores_prompt: bool,
    ) -> None:
        first: Sequence | None = None
        fits = len(prompt) + max_tokens - 1 <= self.scheduler.max_pages_per_sequence * self.scheduler.page_size
        for number in range(num_samples):
            sequence = Sequence(
                sequence_id=len(self.sequences),
                prompt_token_ids=prompt,
                params=params,
                seed=seed + number,
                max_len=len(prompt) + max_tokens,
                eos_token_ids=(EOS,),
                cache_salt=salt,
                parent=first,
                priority=seed % 3,
                tenant="abc"[seed // 3 % 3],
                expected_output_len=seed % 40 or None,
            )
            if scores_prompt and number == 0:
                sequence.num_unscored = len(prompt) - 1
                self.num_scored[sequence] = 1
            first = first or sequence
            try:
                self.scheduler.add(sequence)
            except ValueError:
                assert not fits
                self.num_events["refused"] += 1
            else:
                assert fits
                self.sequences.append(sequence)
                self.num_events["added"] += 1

    @precondition(lambda self: any(not sequence.is_finished for sequence in self.sequences))
    @rule(index=st.integers(0, 11), seed=st.integers(0, 1000))
    def fork(self, index: int, seed: int) -> None:
        """A sequence of any age is continued once more, from what is known of it."""
        unfinished = [sequence for sequence in self.sequences if not sequence.is_finished]
        parent = unfinished[-1 - index % len(unfinished)]
        child = parent.fork(len(self.sequences), seed)
        self.device.inherited[child] = list(parent.output_token_ids)
        if parent in self.num_scored:
            self.num_scored[child] = self.num_scored[parent]
        self.scheduler.add(child)
        self.sequences.append(child)
        self.num_events["forked"] += 1
        self.num_events["forked with a token in flight"] += parent.num_in_flight > 0

    @precondition(lambda self: self.can_dispatch())
    @rule()
    def dispatch(self) -> None:
        decoding = [sequence for sequence in self.sequences if sequence.is_decoding and not sequence.is_full]
        plan = self.scheduler.schedule()
        self.check_plan(plan)
        scheduled = {chunk.sequence.sequence_id for chunk in plan.chunks}
        assert {s.sequence_id for s in decoding if s not in plan.preempted} <= scheduled, "a stream was stopped"
        can_go_on = plan.chunks or any(older.chunks for older, _ in self.pending) or not self.scheduler.has_work
        assert can_go_on, "nothing to run, nothing to read, and work left"
        self.pending.append((plan, self.device.run(plan)))

    @precondition(lambda self: self.can_dispatch())
    @rule(is_lost=st.sampled_from([False, False, False, True]))
    def lose(self, is_lost: bool) -> None:
        """A plan does not reach the device."""
        if is_lost:
            plan = self.scheduler.schedule()
            for sequence in plan.preempted:
                self.num_computed[sequence.sequence_id] = 0
            self.scheduler.discard(plan)
            for chunk in plan.chunks:
                self.num_computed[chunk.sequence.sequence_id] = 0
            self.num_events["lost"] += bool(plan.chunks)

    @rule()
    def prefetch(self) -> None:
        self.scheduler.prefetch()

    @rule(is_wanted=st.sampled_from([False, False, False, True]))
    def reset(self, is_wanted: bool) -> None:
        if not is_wanted:
            return
        done = self.scheduler.reset_prefix_cache()
        assert done == (self.scheduler.num_running == 0)
        assert not done or self.scheduler.allocator.num_free == self.scheduler.allocator.num_pages
        self.num_events["reset"] += done

    @precondition(lambda self: self.pending)
    @rule(seconds=st.floats(0.1, 2.0))
    def read(self, seconds: float = 1.0) -> None:
        plan, token_ids = self.pending.popleft()
        self.take_scores(plan)
        if not plan.is_decode_only:
            self.scheduler.step_budget.observe(plan.num_tokens, seconds)
        was_finished = {chunk.sequence for chunk in plan.chunks if chunk.sequence.is_finished}
        finished = self.scheduler.update(plan, token_ids)
        assert not was_finished & set(finished)
        for sequence in finished:
            assert sequence.is_finished and sequence.finish_reason in ("stop", "length")
            self.num_events[sequence.finish_reason] += 1
            self.num_events["ended after preemption"] += sequence.num_preemptions > 0

    @rule(num_steps=st.integers(1, 12))
    def step(self, num_steps: int) -> None:
        """The engine's loop, undisturbed for a while: it reads the tokens of a step behind the dispatch of the next."""
        for _ in range(num_steps):
            if self.can_dispatch():
                self.dispatch()
            if not self.can_dispatch():
                self.read()

    def take_scores(self, plan: StepPlan) -> None:
        """As the engine does: each chunk of a prompt scores the token behind each of its own."""
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence in self.num_scored and not chunk.is_decode and chunk.length > 0:
                num_scored = self.num_scored[sequence]
                assert num_scored == sequence.prompt_len or chunk.start < num_scored, "a token is never scored"
                self.num_scored[sequence] = max(num_scored, min(chunk.start + chunk.length + 1, sequence.prompt_len))
                sequence.num_unscored = sequence.prompt_len - self.num_scored[sequence]

    @precondition(lambda self: self.pending)
    @rule(bad_row=st.integers(0, 5))
    def read_with_nan(self, bad_row: int) -> None:
        plan, token_ids = self.pending.popleft()
        self.take_scores(plan)
        with_nan = [None if row == bad_row else token_id for row, token_id in enumerate(token_ids)]
        for sequence in self.scheduler.update(plan, with_nan):
            self.num_events["error"] += sequence.finish_reason == "error"

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 11), by_stop_string=st.booleans())
    def end(self, index: int, by_stop_string: bool) -> None:
        """Any sequence, of any status, is aborted or found to hold a stop string."""
        sequence = self.sequences[-1 - index % len(self.sequences)]
        reason_before, status = sequence.finish_reason, sequence.status
        if by_stop_string:
            self.scheduler.finish(sequence, "stop", "a stop string")
        else:
            self.scheduler.abort(sequence)
        assert sequence.is_finished
        assert sequence.finish_reason == (reason_before or ("stop" if by_stop_string else "abort"))
        self.num_events[f"ended while {status.value}"] += 1

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 11), num_tokens=st.integers(0, 12), seed=st.sampled_from([None, 1, 2, 3]))
    def rewind(self, index: int, num_tokens: int, seed: int | None) -> None:
        """All is read, and some outputs are taken back: they will be drawn again, or others with another seed."""
        while self.pending:
            self.read()
        sequence = self.sequences[-1 - index % len(self.sequences)]
        if not sequence.is_finished:
            num_tokens = min(num_tokens, len(sequence.output_token_ids))
            self.num_events["rewound while running"] += num_tokens > 0 and sequence.slot is not None
            self.scheduler.rewind(sequence, num_tokens)
            inherited = self.device.inherited.get(sequence, [])
            self.device.inherited[sequence] = inherited[: len(sequence.output_token_ids)]
            if seed is not None:
                self.device.inherited[sequence] = list(sequence.output_token_ids)
                sequence.seed = seed
            self.num_computed[sequence.sequence_id] = sequence.num_computed

    @precondition(lambda self: self.sequences)
    @rule(num_pages=st.integers(0, 8))
    def restore(self, num_pages: int) -> None:
        """All is read, and the unfinished sequences move to another pool, their pages with them where they fit."""
        while self.pending:
            self.read()
        old, old_device = self.scheduler, self.device
        self.scheduler = Scheduler(
            PageAllocator(old.max_pages_per_sequence + num_pages),
            page_size=old.page_size,
            max_num_seqs=old.max_num_seqs,
            max_num_batched_tokens=old.max_num_batched_tokens,
            max_pages_per_sequence=old.max_pages_per_sequence,
            policy=policy_named(self.policy),
            step_budget=old.step_budget,
            enable_prefix_caching=old.prefix_cache.enabled,
            num_host_pages=old.prefix_cache.host_pages.num_pages,
        )
        self.scheduler.num_preemptions = old.num_preemptions
        self.scheduler.prefix_cache.num_evictions = old.prefix_cache.num_evictions
        self.device = FakeDevice(old.page_size)
        self.device.inherited = old_device.inherited
        for sequence in self.sequences:
            if sequence.is_finished:
                continue
            num_computed, table = sequence.num_computed, old_device.page_tables.get(sequence.slot or 0, {})
            held = [dict(old_device.pages[table[column]]) for column in range(len(sequence.pages))]
            sequence.slot, sequence.pages, sequence.num_computed = None, [], 0
            num_filled = self.scheduler.resume(sequence, num_computed)
            self.device.run(StepPlan(offloads=self.scheduler.prefix_cache.take_offloads()))
            if num_filled is not None:
                assert sequence.slot is not None
                self.device.page_tables[sequence.slot] = dict(enumerate(sequence.pages))
                self.device.pages |= dict(zip(sequence.pages[num_filled:], held[num_filled:], strict=True))
                self.num_events["restored with its pages"] += 1
                self.num_events["restored with the pages of another"] += num_filled > 0
            self.num_computed[sequence.sequence_id] = sequence.num_computed

    @invariant()
    def holds_together(self) -> None:
        self.num_events["step"] += 1
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        running = [sequence for sequence in self.sequences if sequence.slot is not None]
        assert len({sequence.slot for sequence in running}) == len(running) <= self.scheduler.max_num_seqs
        for sequence in running:
            assert sequence.slot is not None
            row = self.device.page_tables[sequence.slot]
            assert [row[column] for column in range(len(sequence.pages))] == sequence.pages
            assert sequence.num_in_flight <= self.max_pending

    def can_dispatch(self) -> bool:
        return len(self.pending) < self.max_pending

    def check_plan(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(plan.chunks) <= self.scheduler.max_num_batched_tokens, "a step has rows for as many as its tokens"
        self.num_events["copied"] += len(plan.copies)
        self.num_events["offloaded"] += len(plan.offloads)
        self.num_events["came back"] += len(plan.loads)
        self.num_events["preempted"] += len(plan.preempted)
        # Who gives way to a waiting sequence does it before that one starts; who lost the last pages, after.
        self.num_events["gave way"] += len(plan.preempted) if any(chunk.is_first for chunk in plan.chunks) else 0
        self.num_events["mixed step"] += len({chunk.is_decode for chunk in plan.chunks}) == 2
        for sequence in plan.preempted:
            self.num_events["preempted with a token in flight"] += sequence.num_in_flight > 0
            self.num_computed[sequence.sequence_id] = 0
        new_pages = Counter(new.slot for new in plan.new_pages)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence not in plan.preempted
            if chunk.is_first:
                self.num_computed[sequence.sequence_id] = chunk.start
                self.num_events["hit"] += chunk.start > 0
                self.num_events["hit of generated tokens"] += chunk.start > sequence.prompt_len
                self.num_events["drew with its parent"] += chunk.length == 0
            assert chunk.start + chunk.length < sequence.max_len, "the last token needs no keys and values"
            assert chunk.start == self.num_computed[sequence.sequence_id]
            assert chunk.samples == (chunk.start + chunk.length >= sequence.prefill_len)
            assert chunk.is_decode == (chunk.start >= sequence.prefill_len and chunk.length > 0)
            assert new_pages[sequence.slot or 0] <= chunk.length // self.scheduler.page_size + 1
            self.num_events["chunked prefill"] += not chunk.is_decode and not chunk.samples
            self.num_computed[sequence.sequence_id] += chunk.length

    def teardown(self) -> None:
        """Left alone, everything ends, with the tokens it would have had alone, and nothing is lost."""
        if not hasattr(self, "scheduler"):
            return
        while self.scheduler.has_work:
            self.step(num_steps=1)
        self.scheduler.check()
        allocator = self.scheduler.allocator
        assert allocator.num_free + allocator.num_cached == allocator.num_pages
        self.num_events["evicted"] += self.scheduler.prefix_cache.num_evictions
        assert self.scheduler.num_preemptions == sum(sequence.num_preemptions for sequence in self.sequences)
        for sequence in self.sequences:
            expected = expected_outputs(sequence, self.device.inherited.get(sequence, []))
            assert sequence.is_finished
            if sequence.finish_reason in ("stop", "length") and sequence.stop_reason != "a stop string":
                assert sequence.output_token_ids == expected
            else:
                assert sequence.output_token_ids == expected[: len(sequence.output_token_ids)]


def test_random_lives_leak_nothing_and_end():
    total: Counter[str] = Counter()
    for policy in (*POLICIES, "newest_first"):
        events: Counter[str] = Counter()
        run_state_machine_as_test(
            type(f"EngineOf_{policy}", (EngineMachine,), {"policy": policy, "num_events": events}),
            settings=settings(
                max_examples=150,
                stateful_step_count=100,
                derandomize=True,
                deadline=None,
            ),
        )
        assert min(events["preempted"], events["ended after preemption"]) >= 20, (policy, events)
        assert (events["gave way"] > 0) == policy_named(policy).preempts, (policy, events)
        total += events
    assert total["step"] >= 50_000, total
    for event in (
        *("preempted", "preempted with a token in flight", "ended after preemption", "mixed step", "lost"),
        *("chunked prefill", "stop", "length", "error", "refused", "reset", "gave way"),
        *("ended while waiting", "ended while running", "ended while finished"),
        *("forked", "forked with a token in flight", "drew with its parent", "copied"),
        *("offloaded", "came back"),
        *("rewound while running", "restored with its pages", "restored with the pages of another"),
        *("hit", "hit of generated tokens", "second turn", "evicted"),
    ):
        assert total[event] >= 100, (event, total)
