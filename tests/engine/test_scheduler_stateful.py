"""Random lives of an engine: the scheduler, up to two steps ahead of a simulated device, under every event there is.

The device believes nothing of the host but the plan: it writes tokens into pages through the page table that the
NewPage events gave it, and reads a sequence's whole context back from there before it draws.
"""

from collections import Counter, deque

import pytest
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
from miniinfer_jax.sequence import Chunk, Sequence, StepPlan

EOS = 0
STOP_TOKEN = 1
VOCAB_SIZE = 64
SMALL_QUANTA = {"multi_queue": {"quantum": 8, "num_levels": 3, "boost_interval": 300}}


class NewestFirst(Policy):
    def key(self, sequence: Sequence) -> int:
        return -sequence.sequence_id


def policy_named(name: str) -> Policy:
    return NewestFirst() if name == "newest_first" else make_policy(name, SMALL_QUANTA.get(name))


def draw(seed: int, position: int) -> int:
    """The token at `position` of the sequence with `seed`, whatever else goes on."""
    return (seed * 7919 + position * position * 31 + position * seed) % 1009 % VOCAB_SIZE


def expected_outputs(sequence: Sequence) -> list[int]:
    """What the sequence gives when nothing interferes, by the rules of SamplingParams alone."""
    outputs = []
    while sequence.prompt_len + len(outputs) < sequence.max_len:
        outputs.append(draw(sequence.seed, sequence.prompt_len + len(outputs)))
        may_stop = len(outputs) >= sequence.params.min_tokens
        if may_stop and outputs[-1] in ((STOP_TOKEN,) if sequence.params.ignore_eos else (EOS, STOP_TOKEN)):
            break
    return outputs


class FakeDevice:
    """Pages, page tables and last tokens, changed by plans in order."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[tuple[int, int], int] = {}  # (page, offset) -> token
        self.page_tables: dict[int, dict[int, int]] = {}  # slot -> column -> page
        self.last_tokens: dict[int, int] = {}  # by slot

    def run(self, plan: StepPlan) -> list[int]:
        """Executes a plan: the tokens of its sampling chunks."""
        for new in plan.new_pages:
            self.page_tables.setdefault(new.slot, {})[new.column] = new.page
        for chunk in plan.chunks:
            self.write(chunk)
        return [self.sample(chunk) for chunk in plan.chunks if chunk.samples]

    def place(self, slot: int, position: int) -> tuple[int, int]:
        return self.page_tables[slot][position // self.page_size], position % self.page_size

    def write(self, chunk: Chunk) -> None:
        slot = chunk.sequence.slot
        assert slot is not None
        tokens = chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]
        if chunk.is_decode:
            tokens = [self.last_tokens[slot]]
        assert len(tokens) == chunk.length, "a prefill needs tokens that the host does not know"
        for position, token_id in enumerate(tokens, chunk.start):
            self.pages[self.place(slot, position)] = token_id

    def sample(self, chunk: Chunk) -> int:
        sequence, end = chunk.sequence, chunk.start + chunk.length
        assert sequence.slot is not None
        context = [self.pages[self.place(sequence.slot, position)] for position in range(end)]
        drawn = [draw(sequence.seed, position) for position in range(sequence.prompt_len, end)]
        assert context == sequence.prompt_token_ids + drawn, "the pages hold another context"
        self.last_tokens[sequence.slot] = draw(sequence.seed, end)
        return self.last_tokens[sequence.slot]


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
    )
    def start(
        self,
        page_size: int,
        num_pages: int,
        max_num_seqs: int,
        budget: int,
        max_pending: int,
        target_seconds: float | None,
    ) -> None:
        self.scheduler = Scheduler(
            PageAllocator(num_pages),
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_pages_per_sequence=num_pages,
            policy=policy_named(self.policy),
            step_budget=StepBudget([size for size in (2, 6, 16) if size < budget] + [budget], target_seconds),
        )
        self.max_pending = max_pending  # plans whose tokens are not read yet; the engine itself has two at most
        self.device = FakeDevice(page_size)
        self.sequences: list[Sequence] = []
        self.pending: deque[tuple[StepPlan, list[int]]] = deque()
        self.num_computed: Counter[int] = Counter()  # by sequence id, as the chunks add up

    @rule(
        prompt_len=st.integers(1, 24),
        max_tokens=st.integers(1, 40),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        seed=st.integers(0, 1000),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from("abc"),
        expected_output_len=st.none() | st.integers(1, 40),
        may_be_too_long=st.booleans(),
    )
    def add(
        self,
        prompt_len: int,
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        seed: int,
        priority: int,
        tenant: str,
        expected_output_len: int | None,
        may_be_too_long: bool,
    ) -> None:
        allocator, page_size = self.scheduler.allocator, self.scheduler.page_size
        longest = allocator.num_pages * page_size
        if not may_be_too_long:
            prompt_len = min(prompt_len, longest)
            max_tokens = min(max_tokens, longest + 1 - prompt_len)
        min_tokens = min(min_tokens, max_tokens)
        sequence = Sequence(
            sequence_id=len(self.sequences),
            prompt_token_ids=[VOCAB_SIZE + seed + position for position in range(prompt_len)],
            params=SamplingParams(min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=[STOP_TOKEN]),
            seed=seed,
            max_len=prompt_len + max_tokens,
            eos_token_ids=(EOS,),
            priority=priority,
            tenant=tenant,
            expected_output_len=expected_output_len,
        )
        fits = prompt_len + max_tokens - 1 <= longest
        try:
            self.scheduler.add(sequence)
        except ValueError:
            assert not fits
            self.num_events["refused"] += 1
        else:
            assert fits
            self.sequences.append(sequence)
            self.num_events["added"] += 1

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

    @precondition(lambda self: self.pending)
    @rule(seconds=st.floats(0.1, 2.0))
    def read(self, seconds: float = 1.0) -> None:
        plan, token_ids = self.pending.popleft()
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

    @precondition(lambda self: self.pending)
    @rule(bad_row=st.integers(0, 5))
    def read_with_nan(self, bad_row: int) -> None:
        plan, token_ids = self.pending.popleft()
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
        self.num_events["preempted"] += len(plan.preempted)
        # Who gives way to a waiting sequence does it before that one starts; who lost the last pages, after.
        is_start = [chunk.start == 0 and chunk.sequence.num_preemptions == 0 for chunk in plan.chunks]
        self.num_events["gave way"] += len(plan.preempted) if any(is_start) else 0
        self.num_events["mixed step"] += len({chunk.is_decode for chunk in plan.chunks}) == 2
        for sequence in plan.preempted:
            self.num_events["preempted with a token in flight"] += sequence.num_in_flight > 0
            self.num_computed[sequence.sequence_id] = 0
        new_pages = Counter(new.slot for new in plan.new_pages)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence not in plan.preempted
            assert chunk.start + chunk.length < sequence.max_len, "the last token needs no keys and values"
            assert chunk.start == self.num_computed[sequence.sequence_id]
            assert chunk.samples == (chunk.start + chunk.length >= sequence.prefill_len)
            assert chunk.is_decode == (chunk.start >= sequence.prefill_len)
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
        assert self.scheduler.allocator.num_free == self.scheduler.allocator.num_pages
        assert self.scheduler.num_preemptions == sum(sequence.num_preemptions for sequence in self.sequences)
        for sequence in self.sequences:
            expected = expected_outputs(sequence)
            assert sequence.is_finished
            if sequence.finish_reason in ("stop", "length") and sequence.stop_reason != "a stop string":
                assert sequence.output_token_ids == expected
            else:
                assert sequence.output_token_ids == expected[: len(sequence.output_token_ids)]


@pytest.mark.parametrize("policy", [*POLICIES, "newest_first"])
def test_random_lives_leak_nothing_and_end(policy: str):
    events: Counter[str] = Counter()
    run_state_machine_as_test(
        type("PolicyMachine", (EngineMachine,), {"policy": policy, "num_events": events}),
        settings=settings(
            max_examples=150,
            stateful_step_count=100,
            derandomize=True,
            deadline=None,
        ),
    )
    assert events["step"] >= 10_000, events
    for event in ("preempted", "ended after preemption", "mixed step", "chunked prefill", "stop", "length", "refused"):
        assert events[event] >= 100, (event, events)
    for event in ("ended while waiting", "ended while running", "ended while finished"):
        assert events[event] >= 50, (event, events)
    for event in ("preempted with a token in flight", "error"):
        assert events[event] >= 20, (event, events)
    assert (events["gave way"] > 0) == policy_named(policy).preempts, events
