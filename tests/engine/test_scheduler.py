"""Each rule of the scheduler by itself; the stateful test beside this file holds them all together."""

import pytest

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import NewPage, Sequence, SequenceStatus, StepPlan

EOS = 99


def make_scheduler(num_pages: int = 64, page_size: int = 4, max_num_seqs: int = 8, budget: int = 32) -> Scheduler:
    return Scheduler(
        PageAllocator(num_pages),
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_pages_per_sequence=32,
    )


def make_sequence(sequence_id: int, prompt_len: int, max_tokens: int = 16) -> Sequence:
    return Sequence(
        sequence_id=sequence_id,
        prompt_token_ids=[1] * prompt_len,
        params=SamplingParams(),
        seed=0,
        max_len=prompt_len + max_tokens,
        eos_token_ids=(EOS,),
    )


def chunks_of(plan: StepPlan) -> list[tuple[int, int, int, bool, bool]]:
    """(sequence id, start, length, samples, is_decode) of every chunk."""
    return [(c.sequence.sequence_id, c.start, c.length, c.samples, c.is_decode) for c in plan.chunks]


def run_step(scheduler: Scheduler, token_id: int = 5) -> StepPlan:
    """A step whose tokens, all `token_id`, are read at once."""
    plan = scheduler.schedule()
    scheduler.update(plan, [token_id for chunk in plan.chunks if chunk.samples])
    scheduler.check()
    return plan


def test_prefill_then_decode_one_step_ahead():
    scheduler = make_scheduler()
    sequence = make_sequence(0, prompt_len=5, max_tokens=3)
    scheduler.add(sequence)
    first = scheduler.schedule()
    assert chunks_of(first) == [(0, 0, 5, True, False)]
    assert [(new.slot, new.column) for new in first.new_pages] == [(sequence.slot, 0), (sequence.slot, 1)]
    assert [new.page for new in first.new_pages] == sequence.pages
    second = scheduler.schedule()  # before the first token is read
    assert chunks_of(second) == [(0, 5, 1, True, True)]
    assert second.new_pages == []
    assert scheduler.update(first, [7]) == []
    third = scheduler.schedule()
    assert chunks_of(third) == [(0, 6, 1, True, True)]
    assert scheduler.schedule().chunks == []  # full: three tokens read or in flight
    assert scheduler.update(second, [8]) == []
    assert scheduler.update(third, [9]) == [sequence]
    assert (sequence.output_token_ids, sequence.finish_reason) == ([7, 8, 9], "length")
    assert not scheduler.has_work
    scheduler.check()


def test_a_stop_is_seen_one_step_late_and_the_extra_token_dropped():
    scheduler = make_scheduler()
    sequence = make_sequence(0, prompt_len=3)
    scheduler.add(sequence)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.update(first, [EOS]) == [sequence]
    assert (sequence.slot, sequence.pages, sequence.num_in_flight) == (None, [], 0)
    assert scheduler.update(second, [8]) == []
    assert (sequence.output_token_ids, sequence.finish_reason) == ([EOS], "stop")
    scheduler.check()


def test_a_long_prompt_is_cut_by_the_budget_and_decoding_goes_first():
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_sequence(0, prompt_len=2))
    run_step(scheduler)
    scheduler.add(make_sequence(1, prompt_len=16))
    assert chunks_of(run_step(scheduler)) == [(0, 2, 1, True, True), (1, 0, 7, False, False)]
    assert chunks_of(run_step(scheduler)) == [(0, 3, 1, True, True), (1, 7, 7, False, False)]
    assert chunks_of(run_step(scheduler)) == [(0, 4, 1, True, True), (1, 14, 2, True, False)]
    assert chunks_of(run_step(scheduler)) == [(0, 5, 1, True, True), (1, 16, 1, True, True)]


def test_chunks_of_several_prompts_share_a_step_in_order_of_arrival():
    scheduler = make_scheduler(budget=10)
    for sequence_id in range(3):
        scheduler.add(make_sequence(sequence_id, prompt_len=4))
    assert chunks_of(run_step(scheduler)) == [(0, 0, 4, True, False), (1, 0, 4, True, False), (2, 0, 2, False, False)]


def test_slots_bound_the_number_of_running_sequences():
    scheduler = make_scheduler(max_num_seqs=2)
    sequences = [make_sequence(sequence_id, prompt_len=2) for sequence_id in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    freed = sequences[0].slot
    scheduler.abort(sequences[0])
    run_step(scheduler)
    assert sequences[2].slot == freed


def test_a_budget_below_the_slots_bounds_who_decodes_and_nobody_skips_a_step():
    scheduler = make_scheduler(budget=2)
    sequences = [make_sequence(sequence_id, prompt_len=3, max_tokens=4) for sequence_id in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        decoding = {sequence.sequence_id for sequence in sequences if sequence.is_decoding}
        plan = run_step(scheduler)
        assert plan.num_tokens <= 2
        assert decoding <= {chunk.sequence.sequence_id for chunk in plan.chunks}
    assert all(len(sequence.output_token_ids) == 4 for sequence in sequences)


def test_the_last_arrival_is_preempted_and_computed_anew():
    scheduler = make_scheduler(num_pages=6, budget=32)
    old, young = make_sequence(0, prompt_len=8, max_tokens=16), make_sequence(1, prompt_len=4, max_tokens=16)
    scheduler.add(old)
    scheduler.add(young)
    plan = run_step(scheduler)
    assert len(plan.chunks) == 2
    while not plan.preempted:
        num_outputs = len(young.output_token_ids)
        plan = run_step(scheduler)
    assert plan.preempted == [young]
    assert [chunk.sequence for chunk in plan.chunks] == [old]
    assert young.status is SequenceStatus.WAITING
    assert (young.pages, young.slot, young.num_computed, young.num_preemptions) == ([], None, 0, 1)
    assert scheduler.num_preemptions == 1
    while not young.pages:
        plan = run_step(scheduler)
    assert old.finish_reason == "length"
    resumed_len = 4 + num_outputs
    assert chunks_of(plan) == [(1, 0, resumed_len, True, False)]
    assert plan.new_pages == [NewPage(young.slot or 0, column, page) for column, page in enumerate(young.pages)]
    while scheduler.has_work:
        run_step(scheduler)
    assert len(young.output_token_ids) == 16


def test_a_preempted_sequence_waits_for_its_token_in_flight():
    scheduler = make_scheduler(num_pages=4)
    old, young = make_sequence(0, prompt_len=4, max_tokens=12), make_sequence(1, prompt_len=3, max_tokens=8)
    scheduler.add(old)
    scheduler.add(young)
    plans = [scheduler.schedule()]
    while not plans[-1].preempted:
        plans.append(scheduler.schedule())
        if len(plans) > 2:
            older = plans.pop(0)
            scheduler.update(older, [5 for chunk in older.chunks if chunk.samples])
    assert young.num_in_flight == 1
    scheduler.abort(old)
    assert scheduler.schedule().chunks == []  # pages and slots are free, the token is not known
    num_known = young.num_known_tokens
    scheduler.update(plans[0], [5 for chunk in plans[0].chunks if chunk.samples])
    assert young.num_known_tokens == num_known + 1
    assert chunks_of(scheduler.schedule()) == [(1, 0, num_known + 1, True, False)]


def test_the_token_in_flight_of_a_preempted_sequence_may_end_it():
    scheduler = make_scheduler(num_pages=4)
    old, young = make_sequence(0, prompt_len=4, max_tokens=12), make_sequence(1, prompt_len=3, max_tokens=8)
    scheduler.add(old)
    scheduler.add(young)
    previous, plan = scheduler.schedule(), scheduler.schedule()
    while not plan.preempted:
        scheduler.update(previous, [5, 5])
        previous, plan = plan, scheduler.schedule()
    assert young.status is SequenceStatus.WAITING
    assert scheduler.update(previous, [5, EOS]) == [young]
    assert young.finish_reason == "stop"
    assert scheduler.num_waiting == 0
    scheduler.check()


def test_admission_keeps_a_page_to_grow_for_each_that_runs():
    scheduler = make_scheduler(num_pages=3)
    scheduler.add(make_sequence(0, prompt_len=4, max_tokens=6))
    run_step(scheduler)
    scheduler.add(make_sequence(1, prompt_len=4, max_tokens=5))  # one page now, and one soon
    assert [chunk.sequence.sequence_id for chunk in run_step(scheduler).chunks] == [0]


def test_a_prompt_is_admitted_whole_or_not_at_all():
    scheduler = make_scheduler(num_pages=8, budget=4)
    scheduler.add(make_sequence(0, prompt_len=8))
    run_step(scheduler)
    run_step(scheduler)
    scheduler.add(make_sequence(1, prompt_len=20, max_tokens=4))  # 6 pages with room to grow, 5 are unclaimed
    scheduler.add(make_sequence(2, prompt_len=1))  # would fit, and must not overtake
    run_step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)


def test_finish_takes_a_running_sequence_out_and_keeps_its_reason():
    scheduler = make_scheduler()
    sequence = make_sequence(0, prompt_len=3)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    scheduler.finish(sequence, "stop", stop_reason="\n\n")
    scheduler.abort(sequence)
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", "\n\n")
    assert scheduler.update(plan, [5]) == []
    assert sequence.output_token_ids == []
    assert not scheduler.has_work
    scheduler.check()


def test_a_waiting_sequence_can_be_aborted():
    scheduler = make_scheduler()
    first, second = make_sequence(0, prompt_len=3), make_sequence(1, prompt_len=3)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.abort(first)
    assert (scheduler.num_waiting, first.finish_reason) == (1, "abort")
    assert [chunk.sequence for chunk in run_step(scheduler).chunks] == [second]


def test_a_token_that_means_nothing_ends_its_sequence_alone():
    scheduler = make_scheduler()
    bad, good = make_sequence(0, prompt_len=3), make_sequence(1, prompt_len=3)
    scheduler.add(bad)
    scheduler.add(good)
    assert scheduler.update(scheduler.schedule(), [None, 5]) == [bad]
    assert (bad.finish_reason, bad.output_token_ids) == ("error", [])
    assert (good.finish_reason, good.output_token_ids) == (None, [5])


def test_as_many_tokens_as_sampling_chunks():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, prompt_len=3))
    with pytest.raises(ValueError, match="shorter"):
        scheduler.update(scheduler.schedule(), [])


def test_a_sequence_that_fills_the_pool_to_the_last_token_ends():
    scheduler = make_scheduler(num_pages=2)
    sequence = make_sequence(0, prompt_len=4, max_tokens=5)  # computes 8 tokens, draws a 9th
    scheduler.add(sequence)
    while scheduler.has_work:
        run_step(scheduler)
    assert len(sequence.output_token_ids) == 5
    assert scheduler.num_preemptions == 0


def test_what_the_pool_can_never_hold_is_refused():
    scheduler = make_scheduler(num_pages=4)
    with pytest.raises(ValueError, match=r"needs 6 pages .* num_pages is 4: raise num_pages by 2"):
        scheduler.add(make_sequence(0, prompt_len=8, max_tokens=16))
    assert not scheduler.has_work


def test_what_a_page_table_can_never_hold_is_refused():
    with pytest.raises(ValueError, match=r"needs 33 pages .* holds 32: raise max_model_len by 4"):
        make_scheduler().add(make_sequence(0, prompt_len=129, max_tokens=1))


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(0, 4), (4, 0)])
def test_a_prompt_needs_a_token_and_room_for_another(prompt_len: int, max_tokens: int):
    with pytest.raises(ValueError, match=f"the prompt has {prompt_len} tokens"):
        make_scheduler().add(make_sequence(0, prompt_len, max_tokens))


def test_an_id_in_use_is_refused():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, prompt_len=1))
    with pytest.raises(ValueError, match="id 0 is in use"):
        scheduler.add(make_sequence(0, prompt_len=1))


def test_check_sees_a_lost_slot_and_a_stolen_page():
    scheduler = make_scheduler()
    sequence = make_sequence(0, prompt_len=3)
    scheduler.add(sequence)
    scheduler.schedule()
    slot, sequence.slot = sequence.slot, None
    with pytest.raises(RuntimeError, match="slots"):
        scheduler.check()
    sequence.slot = slot
    sequence.pages = []
    with pytest.raises(RuntimeError, match="0 owners"):
        scheduler.check()
