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
from miniinfer_jax.engine.policies import POLICIES
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Chunk, Sequence, StepPlan

EOS = 0
STOP_TOKEN = 1
VOCAB_SIZE = 64


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

    num_events: Counter[str] = Counter()  # over all examples: proves that everything did happen

    @initialize(
        page_size=st.integers(1, 5),
        num_pages=st.integers(4, 24),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 32),
        max_pending=st.integers(1, 3),
        policy=st.sampled_from(["fcfs", "newest_first"]),
    )
    def start(
        self, page_size: int, num_pages: int, max_num_seqs: int, budget: int, max_pending: int, policy: str
    ) -> None:
        self.scheduler = Scheduler(
            PageAllocator(num_pages),
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_pages_per_sequence=num_pages,
            policy=policy,
        )
        self.policy = policy
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
    )
    def add(self, prompt_len: int, max_tokens: int, min_tokens: int, ignore_eos: bool, seed: int) -> None:
        min_tokens = min(min_tokens, max_tokens)
        sequence = Sequence(
            sequence_id=len(self.sequences),
            prompt_token_ids=[VOCAB_SIZE + seed + position for position in range(prompt_len)],
            params=SamplingParams(min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=[STOP_TOKEN]),
            seed=seed,
            max_len=prompt_len + max_tokens,
            eos_token_ids=(EOS,),
        )
        max_pages, page_size = self.scheduler.max_pages_per_sequence, self.scheduler.page_size
        fits = prompt_len + max_tokens - 1 <= max_pages * page_size
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
    @rule()
    def read(self) -> None:
        plan, token_ids = self.pending.popleft()
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

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 11), num_tokens=st.integers(0, 12))
    def rewind(self, index: int, num_tokens: int) -> None:
        """All is read, and some outputs are taken back: they will be drawn again."""
        while self.pending:
            self.read()
        sequence = self.sequences[-1 - index % len(self.sequences)]
        if not sequence.is_finished:
            num_tokens = min(num_tokens, len(sequence.output_token_ids))
            self.num_events["rewound while running"] += num_tokens > 0 and sequence.slot is not None
            self.scheduler.rewind(sequence, num_tokens)
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
            policy=self.policy,
        )
        self.scheduler.num_preemptions = old.num_preemptions
        self.device = FakeDevice(old.page_size)
        for sequence in self.sequences:
            if sequence.is_finished:
                continue
            num_computed, table = sequence.num_computed, old_device.page_tables.get(sequence.slot or 0, {})
            pages = [old_device.pages[table[p // old.page_size], p % old.page_size] for p in range(num_computed)]
            sequence.slot, sequence.pages, sequence.num_computed = None, [], 0
            if self.scheduler.resume(sequence, num_computed):
                assert sequence.slot is not None
                self.device.page_tables[sequence.slot] = dict(enumerate(sequence.pages))
                for position, token_id in enumerate(pages):
                    self.device.pages[self.device.place(sequence.slot, position)] = token_id
                self.num_events["restored with its pages"] += 1
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
        self.num_events["preempted"] += len(plan.preempted)
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


def test_random_lives_leak_nothing_and_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(POLICIES, "newest_first", lambda sequence: -sequence.sequence_id)
    EngineMachine.num_events = Counter()
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=700,
            stateful_step_count=100,
            derandomize=True,
            deadline=None,
        ),
    )
    events = EngineMachine.num_events
    assert events["step"] >= 50_000, events
    for event in ("preempted", "preempted with a token in flight", "ended after preemption", "mixed step"):
        assert events[event] >= 100, (event, events)
    for event in ("chunked prefill", "stop", "length", "error", "refused"):
        assert events[event] >= 100, (event, events)
    for event in ("rewound while running", "restored with its pages"):
        assert events[event] >= 100, (event, events)
    for event in ("ended while waiting", "ended while running", "ended while finished"):
        assert events[event] >= 100, (event, events)
