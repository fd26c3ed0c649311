"""The rules by which sequences share pages; the stateful test holds them all together."""

import pytest

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import NewPage, PageCopy, Sequence, StepPlan
from tests.engine.test_scheduler import chunks_of, run_step


def make_scheduler(
    num_pages: int = 64, max_num_seqs: int = 8, budget: int = 32, enable_prefix_caching: bool = True
) -> Scheduler:
    return Scheduler(
        PageAllocator(num_pages),
        page_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_pages_per_sequence=1024,
        enable_prefix_caching=enable_prefix_caching,
    )


def make_sequence(
    sequence_id: int, tokens: list[int], max_tokens: int = 16, parent: Sequence | None = None, **fields: object
) -> Sequence:
    return Sequence(
        sequence_id, tokens, SamplingParams(), seed=0, max_len=len(tokens) + max_tokens, parent=parent, **fields
    )


def add_samples(scheduler: Scheduler, tokens: list[int], num_samples: int, max_tokens: int = 16) -> list[Sequence]:
    first = make_sequence(0, tokens, max_tokens)
    samples = [first, *(make_sequence(number, tokens, max_tokens, first) for number in range(1, num_samples))]
    for sample in samples:
        scheduler.add(sample)
    return samples


def finish_all(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        run_step(scheduler)


def test_a_second_prompt_computes_what_differs():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, list(range(12)), max_tokens=1))
    finish_all(scheduler)
    second = make_sequence(1, [*range(8), 90, 91, 92])
    scheduler.add(second)
    plan = run_step(scheduler)
    assert chunks_of(plan) == [(1, 8, 3, True, False)]
    assert [(entry.column, entry.page) for entry in plan.shared_pages] == list(enumerate(second.pages[:2]))
    assert [entry.column for entry in plan.new_pages] == [2]
    assert (second.num_cached_tokens, plan.copies) == (8, [])
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (12 + 11, 8)


def test_the_last_token_is_computed_even_of_a_prompt_that_is_known_whole():
    scheduler = make_scheduler()
    first, second = make_sequence(0, list(range(8)), max_tokens=1), make_sequence(1, list(range(8)))
    scheduler.add(first)
    plan = run_step(scheduler)
    pages = [entry.page for entry in plan.new_pages]
    scheduler.add(second)
    plan = run_step(scheduler)
    assert chunks_of(plan) == [(1, 7, 1, True, False)]
    assert plan.copies == [PageCopy(pages[1], second.pages[1])]
    assert plan.shared_pages == [NewPage(second.slot or 0, 0, pages[0]), NewPage(second.slot or 0, 1, second.pages[1])]
    assert second.pages[0] == pages[0] and second.num_cached_tokens == 7


def test_two_prompts_of_one_step_share_what_the_first_computes_in_it():
    scheduler = make_scheduler()
    first, second = make_sequence(0, list(range(9))), make_sequence(1, [*range(8), 90, 91])
    scheduler.add(first)
    scheduler.add(second)
    assert chunks_of(run_step(scheduler)) == [(0, 0, 9, True, False), (1, 8, 2, True, False)]
    assert first.pages[:2] == second.pages[:2]


def test_generated_tokens_are_found_by_the_next_turn():
    scheduler = make_scheduler()
    first = make_sequence(0, list(range(6)), max_tokens=7)
    scheduler.add(first)
    finish_all(scheduler)
    said = first.token_ids
    assert len(said) == 13  # 12 of them computed
    second = make_sequence(1, [*said, 90])
    scheduler.add(second)
    assert chunks_of(run_step(scheduler)) == [(1, 12, 2, True, False)]


def test_a_preempted_sequence_finds_its_own_pages_again():
    scheduler = make_scheduler(num_pages=6)
    old, young = make_sequence(0, list(range(8)), max_tokens=16), make_sequence(1, list(range(50, 56)), max_tokens=8)
    scheduler.add(old)
    scheduler.add(young)
    while not run_step(scheduler, token_id=5).preempted:
        pass
    assert young.num_known_tokens == 11  # 8 of them in full pages
    scheduler.abort(old)
    assert chunks_of(run_step(scheduler)) == [(1, 8, 3, True, False)]
    assert young.num_cached_tokens == 0  # what was found the first time


def test_cached_pages_count_as_free_for_newcomers_and_for_growth():
    scheduler = make_scheduler(num_pages=4)
    scheduler.add(make_sequence(0, list(range(8)), max_tokens=6))
    finish_all(scheduler)
    assert (scheduler.allocator.num_free, scheduler.allocator.num_cached) == (1, 3)
    other = make_sequence(1, list(range(50, 58)), max_tokens=8)
    scheduler.add(other)
    finish_all(scheduler)
    assert other.finish_reason == "length" and scheduler.num_preemptions == 0
    assert scheduler.prefix_cache.num_evictions == 3


def test_a_source_that_would_be_needed_for_new_pages_is_not_held():
    """Four pages, all cached; a prompt that fills the pool shares three and cannot afford to hold the fourth."""
    scheduler = make_scheduler(num_pages=4)
    scheduler.add(make_sequence(0, list(range(16)), max_tokens=1))
    finish_all(scheduler)
    again = make_sequence(1, list(range(16)), max_tokens=1)
    scheduler.add(again)
    plan = run_step(scheduler)
    assert chunks_of(plan) == [(1, 12, 4, True, False)] and plan.copies == []
    assert again.finish_reason == "length"


def test_an_error_leaves_nothing_in_the_cache():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, list(range(100, 108)), max_tokens=1))
    finish_all(scheduler)
    bad = make_sequence(1, list(range(9)))
    scheduler.add(bad)
    scheduler.update(scheduler.schedule(), [None])
    assert bad.finish_reason == "error"
    assert scheduler.allocator.num_cached == 2  # the other's
    scheduler.add(make_sequence(2, list(range(9))))
    assert chunks_of(run_step(scheduler)) == [(2, 0, 9, True, False)]


def test_salts_keep_tenants_apart():
    scheduler = make_scheduler()
    for number, salt in enumerate((None, "a", "b", "a")):
        scheduler.add(make_sequence(number, list(range(9)), max_tokens=1, cache_salt=salt))
    starts = [start for _, start, *_ in chunks_of(run_step(scheduler))]
    assert starts == [0, 0, 0, 8]


def test_reset_forgets_everything_unless_somebody_runs():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, list(range(9)), max_tokens=2))
    run_step(scheduler)
    assert not scheduler.reset_prefix_cache()
    finish_all(scheduler)
    scheduler.add(make_sequence(1, list(range(9))))  # it waits, and holds nothing
    assert scheduler.reset_prefix_cache()
    assert scheduler.allocator.num_free == scheduler.allocator.num_pages
    assert chunks_of(run_step(scheduler)) == [(1, 0, 9, True, False)]


def test_a_scored_prompt_is_computed_whole_and_once():
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_sequence(0, list(range(13)), max_tokens=1))
    finish_all(scheduler)
    scored = make_sequence(1, list(range(13)), num_unscored=12)
    scheduler.add(scored)
    assert chunks_of(run_step(scheduler)) == [(1, 0, 8, False, False)]
    finish_all(scheduler)
    half_scored = make_sequence(2, list(range(13)), num_unscored=4)  # the scores of tokens 1 to 8 have been read
    scheduler.add(half_scored)
    assert chunks_of(run_step(scheduler)) == [(2, 8, 5, True, False)]


def test_samples_of_one_prompt_use_its_pages_once_and_compute_it_once():
    scheduler = make_scheduler(num_pages=1024, max_num_seqs=64, budget=512)
    samples = add_samples(scheduler, list(range(2000)), 64)  # 500 pages, all full
    computed = 0
    while not samples[-1].pages:
        plan = run_step(scheduler)
        computed += plan.num_tokens
    assert computed == 2000
    assert scheduler.allocator.num_used == 500
    assert all(sample.pages == samples[0].pages for sample in samples)
    run_step(scheduler)
    assert scheduler.allocator.num_used == 500 + 64
    assert len({sample.pages[-1] for sample in samples}) == 64


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_part_filled_page_is_copied_by_all_but_the_last_that_write_to_it(enable_prefix_caching):
    scheduler = make_scheduler(enable_prefix_caching=enable_prefix_caching)
    samples = add_samples(scheduler, list(range(10)), 4)
    plan = run_step(scheduler)
    assert [chunk.length for chunk in plan.chunks] == [10, 0, 0, 0]
    assert all(chunk.samples and not chunk.is_decode for chunk in plan.chunks)
    assert scheduler.allocator.num_used == 3 and plan.copies == []
    shared = samples[0].pages[2]
    plan = run_step(scheduler)
    assert [copy.source for copy in plan.copies] == [shared] * 3
    assert sorted(page for sample in samples for page in sample.pages[2:]) == sorted(
        [shared, *(copy.target for copy in plan.copies)]
    )
    assert scheduler.allocator.num_used == 6
    assert run_step(scheduler).copies == []
    finish_all(scheduler)
    assert [len(sample.output_token_ids) for sample in samples] == [16] * 4


def test_a_sample_that_finds_no_slot_starts_from_its_running_parent():
    """Also without a prefix cache: the part-filled page is copied from the parent, its last token computed."""
    scheduler = make_scheduler(max_num_seqs=2, enable_prefix_caching=False)
    first, second, third = add_samples(scheduler, list(range(10)), 3)
    run_step(scheduler)
    run_step(scheduler)
    scheduler.abort(second)
    plan = run_step(scheduler)
    assert chunks_of(plan)[1] == (2, 9, 1, True, False)
    assert third.pages[:2] == first.pages[:2]
    assert plan.copies == [PageCopy(first.pages[2], third.pages[2])]


def test_a_fork_shares_full_pages_and_goes_on_from_the_known_tokens():
    scheduler = make_scheduler(enable_prefix_caching=False)
    parent = make_sequence(0, list(range(7)))
    scheduler.add(parent)
    run_step(scheduler, token_id=50)
    run_step(scheduler, token_id=51)
    in_flight = scheduler.schedule()
    child = parent.fork(1, seed=9)
    scheduler.add(child)
    plan = scheduler.schedule()
    assert child.output_token_ids == [50, 51]
    assert chunks_of(plan) == [(0, 9, 1, True, True), (1, 8, 1, True, False)]
    assert child.pages[:2] == parent.pages[:2] and child.pages[2] != parent.pages[2]
    assert plan.copies == []  # the last known token is the first of its page
    scheduler.update(in_flight, [60])
    scheduler.update(plan, [61, 70])
    assert parent.output_token_ids == [50, 51, 60, 61]
    assert child.output_token_ids == [50, 51, 70]


def test_a_plan_that_is_lost_is_computed_anew_and_leaves_nothing():
    scheduler = make_scheduler()
    sequence = make_sequence(0, list(range(9)))
    scheduler.add(sequence)
    scheduler.discard(scheduler.schedule())
    scheduler.check()
    assert scheduler.allocator.num_free == scheduler.allocator.num_pages
    assert (sequence.num_in_flight, scheduler.num_waiting) == (0, 1)
    assert chunks_of(run_step(scheduler)) == [(0, 0, 9, True, False)]


def test_waiting_costs_no_second_look_at_the_prompt(monkeypatch):
    """What was matched is remembered: a sequence that waits for pages is not looked up page by page again."""
    scheduler = make_scheduler(num_pages=291, budget=2000)
    scheduler.add(make_sequence(0, list(range(1000)), max_tokens=1))
    finish_all(scheduler)
    scheduler.add(make_sequence(1, list(range(5000, 5160)), max_tokens=40))
    run_step(scheduler)
    waiting = make_sequence(2, [*range(1000), 1], max_tokens=1)
    scheduler.add(waiting)
    assert waiting not in [chunk.sequence for chunk in run_step(scheduler).chunks]
    asked = []
    original = Sequence.tokens_between
    monkeypatch.setattr(Sequence, "tokens_between", lambda *args: asked.append(args) or original(*args))
    run_step(scheduler)
    assert [end - start for sequence, start, end in asked if sequence is waiting] == [0]


def test_plans_without_sharing_say_nothing_of_it():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, list(range(9))))
    plan = run_step(scheduler)
    assert plan == StepPlan(chunks=plan.chunks, new_pages=plan.new_pages)
