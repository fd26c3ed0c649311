"""What each policy promises, held against the real scheduler and a device that answers at once."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import OUTPUT_TOKEN_COST, POLICIES, PROMPT_TOKEN_COST, Fair, MultiQueue, make_policy
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence, SequenceStatus, StepPlan


def make_scheduler(policy, *, num_pages: int = 64, max_num_seqs: int = 4, budget: int = 32) -> Scheduler:
    return Scheduler(
        PageAllocator(num_pages),
        page_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_pages_per_sequence=num_pages,
        policy=make_policy(policy) if isinstance(policy, str) else policy,
    )


def make_sequence(sequence_id: int, prompt_len: int = 4, max_tokens: int = 4, **changes) -> Sequence:
    return Sequence(
        sequence_id=sequence_id,
        prompt_token_ids=[1] * prompt_len,
        params=SamplingParams(),
        seed=0,
        max_len=prompt_len + max_tokens,
        **changes,
    )


def run_step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    scheduler.update(plan, [5 for chunk in plan.chunks if chunk.samples])
    scheduler.check()
    return plan


def order_of_finishing(scheduler: Scheduler, sequences: list[Sequence]) -> list[int]:
    for sequence in sequences:
        scheduler.add(sequence)
    finished: list[int] = []
    while scheduler.has_work:
        run_step(scheduler)
        finished += [s.sequence_id for s in sequences if s.is_finished and s.sequence_id not in finished]
    return finished


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_sequences_go_in_order_of_arrival(policy):
    sequences = [make_sequence(sequence_id) for sequence_id in range(6)]
    assert order_of_finishing(make_scheduler(policy, max_num_seqs=1), sequences) == list(range(6))


def test_shortest_job_first_by_estimate_or_by_max_tokens():
    sequences = [
        make_sequence(0, max_tokens=20),
        make_sequence(1, max_tokens=8),
        make_sequence(2, max_tokens=40, expected_output_len=2),
        make_sequence(3, prompt_len=12, max_tokens=2),
    ]
    assert order_of_finishing(make_scheduler("sjf", max_num_seqs=1), sequences) == [2, 1, 3, 0]


def test_what_outlives_its_estimate_is_expected_to_end_and_goes_on():
    scheduler = make_scheduler("sjf", max_num_seqs=2)
    wrong, right = make_sequence(0, max_tokens=30, expected_output_len=1), make_sequence(1, max_tokens=10)
    assert order_of_finishing(scheduler, [wrong, right]) == [1, 0]
    assert len(wrong.output_token_ids) == 30


def steps_until_done(scheduler: Scheduler, sequence: Sequence, feed: Callable[[int], Iterator[Sequence]]) -> int:
    """Steps until `sequence` ends, while `feed` keeps the queue full."""
    scheduler.add(sequence)
    for step in range(5000):
        for other in feed(step):
            scheduler.add(other)
        run_step(scheduler)
        if sequence.is_finished:
            return step
    raise AssertionError(f"starved: {sequence.status}")


def test_a_long_job_is_overtaken_by_no_more_than_its_work_over_the_ageing():
    ageing, long_work, short_work = 0.1, 4 + 50, 4 + 4
    scheduler = make_scheduler(make_policy("sjf", {"ageing": ageing}), max_num_seqs=1, budget=8)
    others: list[Sequence] = []

    def feed(step: int) -> Iterator[Sequence]:
        others.append(make_sequence(1 + step))  # 8 tokens of work a step, more than the engine computes
        yield others[-1]

    long = make_sequence(0, max_tokens=50)
    steps_until_done(scheduler, long, feed)
    overtook = [other for other in others if other.is_finished]
    assert len(overtook) > 10  # the short ones do go first
    # The latest that goes first came when the clock stood at (long_work - short_work) / ageing.
    latest = (long_work - short_work) / ageing
    assert max(other.arrival for other in overtook) <= latest


def test_a_waiting_sequence_takes_the_slot_of_a_less_urgent_one():
    scheduler = make_scheduler("priority", max_num_seqs=2)
    low, middle = make_sequence(0, max_tokens=20, priority=5), make_sequence(1, max_tokens=20, priority=1)
    scheduler.add(low)
    scheduler.add(middle)
    run_step(scheduler)
    urgent = make_sequence(2, priority=0)
    scheduler.add(urgent)
    plan = run_step(scheduler)
    assert plan.preempted == [low]
    assert {chunk.sequence for chunk in plan.chunks} == {middle, urgent}
    scheduler.add(make_sequence(3, priority=5))
    assert run_step(scheduler).preempted == []  # equals do not give way
    while scheduler.has_work:
        run_step(scheduler)
    assert (len(low.output_token_ids), low.num_preemptions) == (20, 1)


def test_a_waiting_sequence_takes_the_pages_of_less_urgent_ones_and_no_more_than_it_needs():
    scheduler = make_scheduler("priority", num_pages=12)
    lows = [make_sequence(sequence_id, prompt_len=8, max_tokens=8, priority=sequence_id) for sequence_id in (1, 2, 3)]
    for low in lows:
        scheduler.add(low)
    run_step(scheduler)  # 2 pages each, and 2 for the next token and room to grow
    urgent = make_sequence(4, prompt_len=12, max_tokens=8, priority=0)  # 3 pages and 1 to grow
    scheduler.add(urgent)
    assert run_step(scheduler).preempted == [lows[2]]
    assert urgent.status is SequenceStatus.RUNNING


def test_nobody_gives_way_in_vain():
    scheduler = make_scheduler("priority", num_pages=12)
    equal, low = (
        make_sequence(sequence_id, prompt_len=16, max_tokens=8, priority=sequence_id) for sequence_id in (0, 1)
    )
    scheduler.add(equal)
    scheduler.add(low)
    run_step(scheduler)
    scheduler.add(make_sequence(2, prompt_len=32, max_tokens=8, priority=0))  # would not fit beside its equal
    assert run_step(scheduler).preempted == []


def test_a_prompt_under_way_leaves_its_share_of_the_step_to_a_more_urgent_one():
    scheduler = make_scheduler("priority", budget=8)
    slow, urgent = make_sequence(0, prompt_len=40, priority=1), make_sequence(1, prompt_len=6, priority=0)
    scheduler.add(slow)
    run_step(scheduler)
    scheduler.add(urgent)
    assert [(c.sequence, c.length) for c in run_step(scheduler).chunks] == [(slow, 2), (urgent, 6)]


# The bound of the VTC paper, theorem 4.4, for prompts of 12 and outputs of 20 tokens in 4 slots.
LONGEST_PROMPT, LONGEST_OUTPUT, NUM_SLOTS = 12, 20, 4
MOST_IN_BATCH = NUM_SLOTS * (LONGEST_PROMPT + LONGEST_OUTPUT)
SERVICE_BOUND = 2 * max(PROMPT_TOKEN_COST * LONGEST_PROMPT, OUTPUT_TOKEN_COST * MOST_IN_BATCH)


def largest_gap(policy: str, num_steps: int = 3000) -> float:
    """Between the services of two backlogged tenants in any interval; one of them asks for far more."""
    scheduler = make_scheduler(policy, num_pages=MOST_IN_BATCH, max_num_seqs=NUM_SLOTS, budget=16)
    service: Counter[str] = Counter()
    alive: list[Sequence] = []
    num_sequences, gaps = 0, []
    for _ in range(num_steps):
        alive = [sequence for sequence in alive if not sequence.is_finished]
        for tenant, wanted in (("greedy", 20), ("modest", 2)):
            num_waiting = sum(s.tenant == tenant and s.status is SequenceStatus.WAITING for s in alive)
            for _ in range(wanted - num_waiting):
                prompt_len, max_tokens = 1 + num_sequences % LONGEST_PROMPT, 1 + (num_sequences * 7) % LONGEST_OUTPUT
                alive.append(make_sequence(num_sequences, prompt_len, max_tokens, tenant=tenant))
                scheduler.add(alive[-1])
                num_sequences += 1
        for chunk in run_step(scheduler).chunks:
            cost = OUTPUT_TOKEN_COST if chunk.is_decode else PROMPT_TOKEN_COST
            service[chunk.sequence.tenant] += cost * chunk.length
        gaps.append(service["greedy"] - service["modest"])
    return max(gaps) - min(gaps)


def test_the_service_of_backlogged_tenants_differs_by_the_bound_of_the_paper_at_most():
    assert largest_gap("fair") <= SERVICE_BOUND
    assert largest_gap("fcfs") > 10 * SERVICE_BOUND


def serve_for(scheduler: Scheduler, tenants: dict[str, int], num_steps: int) -> Counter[str]:
    """Tokens computed by tenant, each of which adds its number of sequences at the start."""
    served: Counter[str] = Counter()
    sequence_id = max(scheduler._unfinished, default=-1) + 1
    for tenant, count in tenants.items():
        for _ in range(count):
            scheduler.add(make_sequence(sequence_id, tenant=tenant))
            sequence_id += 1
    for _ in range(num_steps):
        for chunk in run_step(scheduler).chunks:
            served[chunk.sequence.tenant] += chunk.length
    return served


def test_a_tenant_of_twice_the_weight_gets_twice_the_service():
    scheduler = make_scheduler(make_policy("fair", {"weights": {"gold": 2}}), budget=8)
    served = serve_for(scheduler, {"plain": 300, "gold": 300}, 300)
    assert served["gold"] / served["plain"] == pytest.approx(2, rel=0.1)


def test_a_tenant_that_comes_back_has_saved_up_nothing():
    scheduler = make_scheduler("fair", max_num_seqs=2)
    serve_for(scheduler, {"steady": 400, "guest": 1}, 200)
    served = serve_for(scheduler, {"guest": 100}, 100)
    assert served["guest"] / served["steady"] == pytest.approx(1, rel=0.15)


def test_tenants_that_are_gone_are_forgotten():
    policy = Fair()
    scheduler = make_scheduler(policy)
    for number in range(5000):
        scheduler.add(make_sequence(number, prompt_len=1, max_tokens=1, tenant=f"tenant-{number}"))
        run_step(scheduler)
    assert len(policy.counters) <= 1025


def test_tokens_computed_anew_are_served_once():
    policy = Fair()
    scheduler = make_scheduler(policy, num_pages=6)
    sequences = [make_sequence(0, prompt_len=8, max_tokens=16), make_sequence(1, max_tokens=16, tenant="b")]
    order_of_finishing(scheduler, sequences)
    assert scheduler.num_preemptions > 0
    assert policy.counters == {"": 8 + 2 * 15, "b": 4 + 2 * 15}


def test_quanta_double_and_a_boost_brings_all_back():
    policy = MultiQueue(quantum=8, num_levels=3, boost_interval=1000)
    scheduler = make_scheduler(policy, num_pages=256)
    sequence = make_sequence(0, prompt_len=4, max_tokens=600)
    scheduler.add(sequence)
    levels = []
    for _ in range(12):
        run_step(scheduler)  # 4 of service for the prompt, then 2 a step
        levels.append(policy.level(sequence))
    assert levels == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]  # at 8, and at 8 + 16
    while policy.level(sequence) == 2:
        run_step(scheduler)
    assert policy.level(sequence) == 0 and sequence.num_computed == 4 + (1000 - 4) // 2


def test_a_newcomer_takes_the_slot_of_one_that_used_up_its_quantum():
    scheduler = make_scheduler(MultiQueue(quantum=16), max_num_seqs=1)
    long, short = make_sequence(0, max_tokens=60), make_sequence(1, max_tokens=3)
    scheduler.add(long)
    scheduler.add(short)
    steps = 0
    while not short.is_finished:
        run_step(scheduler)
        steps += 1
    assert long.num_preemptions == 1 and len(long.output_token_ids) == 7 and steps == 10
    while scheduler.has_work:
        run_step(scheduler)
    assert len(long.output_token_ids) == 60 and long.num_preemptions == 1


def test_newcomers_without_end_starve_nobody():
    policy = MultiQueue(quantum=16, boost_interval=400)
    scheduler = make_scheduler(policy, max_num_seqs=1)

    def feed(step: int) -> Iterator[Sequence]:
        yield make_sequence(1 + step, max_tokens=2)

    assert steps_until_done(scheduler, make_sequence(0, max_tokens=50), feed) > 200


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fifo", {}, "'fifo' is not known; known: fcfs, sjf, priority, fair, multi_queue"),
        ("fcfs", {"quantum": 1}, "has no option 'quantum'; it has no options"),
        ("multi_queue", {"levels": 1}, "has no option 'levels'; it has quantum, num_levels, boost_interval"),
        ("multi_queue", {"quantum": 0}, "quantum is 0; it must be a positive integer"),
        ("multi_queue", {"num_levels": 1.5}, "num_levels is 1.5; it must be a positive integer"),
        ("sjf", {"ageing": 0}, "ageing is 0; it must be a positive number"),
        ("fair", {"weights": {"a": -1}}, "the weight of tenant 'a' is -1; it must be a positive number"),
        ("fair", {"weights": {"a": 0}}, "the weight of tenant 'a' is 0"),
        ("fair", {"weights": {"a": float("nan")}}, "the weight of tenant 'a' is nan"),
        ("fair", {"weights": {"a": "2"}}, "the weight of tenant 'a' is '2'"),
        ("fair", {"weights": {3: 1}}, "the tenant 3; a tenant is a string"),
        ("fair", {"weights": [2]}, "weights is \\[2\\]; give a weight by tenant"),
    ],
)
def test_what_no_policy_can_work_with_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_policy(name, options)
