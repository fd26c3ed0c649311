"""What is done for waiting sequences while the device works, and what is then left for the moment they start."""

import pytest

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.scheduler import MAX_PREFETCHES, Scheduler
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence, StepPlan

PAGE_SIZE = 4


def make_scheduler(num_pages: int) -> Scheduler:
    return Scheduler(
        PageAllocator(num_pages),
        page_size=PAGE_SIZE,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_pages_per_sequence=20,
        enable_prefix_caching=True,
    )


@pytest.fixture
def scheduler() -> Scheduler:
    return make_scheduler(num_pages=20)


def make_sequence(sequence_id: int, prompt: list[int]) -> Sequence:
    return Sequence(sequence_id, prompt, SamplingParams(), seed=0, max_len=len(prompt) + 8)


def run_step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    scheduler.prefetch()
    scheduler.update(plan, [5] * len(plan.samples))
    scheduler.check()
    return plan


def leave_in_cache(scheduler: Scheduler, sequence_id: int, prompt: list[int]) -> None:
    """Computes a prompt and ends, so that its full pages are cached."""
    sequence = make_sequence(sequence_id, prompt)
    scheduler.add(sequence)
    run_step(scheduler)
    scheduler.abort(sequence)


def test_a_start_evicts_nothing_and_puts_nothing_in_the_cache(scheduler, monkeypatch):
    for number in range(5):
        leave_in_cache(scheduler, number, [100 * number + position for position in range(16)])
    assert scheduler.allocator.num_free < 8
    newcomer = make_sequence(9, list(range(1000, 1030)))  # 8 pages, and one to grow
    scheduler.add(newcomer)
    scheduler.prefetch()
    assert scheduler.allocator.num_free >= 9
    num_evictions = scheduler.prefix_cache.num_evictions
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.prefix_cache, "insert", lambda _: pytest.fail("not while the device waits"))
        plan = scheduler.schedule()
    assert [chunk.sequence for chunk in plan.chunks] == [newcomer]
    assert scheduler.prefix_cache.num_evictions == num_evictions
    scheduler.prefetch()
    assert scheduler.prefix_cache.match(make_sequence(10, list(range(1000, 1030))), 29).num_tokens >= 28
    scheduler.check()


@pytest.mark.parametrize("is_prefetched", [True, False])
def test_what_a_waiting_sequence_will_find_is_evicted_last(is_prefetched):
    scheduler = make_scheduler(num_pages=40)
    wanted = list(range(12))
    leave_in_cache(scheduler, 0, wanted)
    for number in range(1, 4):
        leave_in_cache(scheduler, number, [100 * number + position for position in range(12)])
    scheduler.add(make_sequence(4, list(range(500, 524))))
    run_step(scheduler)
    scheduler.add(make_sequence(5, list(range(600, 608))))
    run_step(scheduler)  # both slots are taken
    waiting = make_sequence(6, [*wanted, 7, 7])
    scheduler.add(waiting)
    if is_prefetched:
        scheduler.prefetch()
    assert scheduler.prefix_cache.num_evictions == 0
    scheduler.prefix_cache.make_free(scheduler.prefix_cache.num_available - 3)
    assert scheduler.prefix_cache.match(waiting, 13).num_tokens == (12 if is_prefetched else 0)


def test_sequences_that_start_in_one_step_still_share(scheduler):
    common = list(range(12))
    first, second = make_sequence(0, [*common, 50]), make_sequence(1, [*common, 60])
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    assert first.pages[:3] == second.pages[:3] and second.num_cached_tokens == 12


def test_without_prefetching_pages_enter_with_the_tokens_at_the_latest(scheduler):
    sequence = make_sequence(0, list(range(12)))
    scheduler.add(sequence)
    plan = scheduler.schedule()
    scheduler.update(plan, [5])
    assert scheduler.prefix_cache.match(make_sequence(1, list(range(12))), 11).pages == sequence.pages[:2]


def test_a_plan_that_is_lost_leaves_nothing_in_the_cache(scheduler):
    sequence = make_sequence(0, list(range(12)))
    scheduler.add(sequence)
    scheduler.discard(scheduler.schedule())
    scheduler.prefetch()
    assert scheduler.prefix_cache.match(make_sequence(1, list(range(12))), 11).num_tokens == 0
    scheduler.check()


def test_a_flood_of_new_sequences_is_not_kept_twice(scheduler):
    for number in range(MAX_PREFETCHES + 50):
        sequence = make_sequence(number, [1, 2, 3])
        scheduler.add(sequence)
        scheduler.abort(sequence)
    assert len(scheduler._newcomers) == MAX_PREFETCHES
    for _ in range(MAX_PREFETCHES):
        scheduler.prefetch()
    assert not scheduler._newcomers
