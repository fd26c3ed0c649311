"""The controller of the time between tokens, on a simulated device: no clock is read."""

import random

import pytest

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.engine.step_budget import StepBudget
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence

SIZES = (16, 64, 256, 1024, 2048)


def padded(num_tokens: int) -> int:
    return next(size for size in SIZES if size >= num_tokens)


class Device:
    """A step takes `base` seconds and `per_token` for every token of its padded size, give or take some noise."""

    def __init__(self, base: float, per_token: float, noise: float = 0.1) -> None:
        self.base, self.per_token, self.noise = base, per_token, noise
        self.generator = random.Random(0)

    def seconds(self, num_tokens: int) -> float:
        seconds = self.base + self.per_token * padded(num_tokens)
        return seconds * self.generator.uniform(1 - self.noise, 1 + self.noise)


def sizes_taken(budget: StepBudget, device: Device, num_steps: int, num_decoding: int = 8) -> list[int]:
    """The budgets of steps whose prompts take all they get; the engine reads a step's time two steps late."""
    taken, unread = [], []
    for _ in range(num_steps):
        taken.append(budget.num_tokens(num_decoding))
        unread.append((taken[-1], device.seconds(taken[-1])))
        if len(unread) > 1:
            budget.observe(*unread.pop(0))
    return taken


def test_without_a_target_or_without_listeners_a_step_is_as_long_as_it_can_be():
    assert StepBudget(SIZES).num_tokens(100) == 2048
    assert StepBudget(SIZES, target=1e-9).num_tokens(0) == 2048


def test_the_largest_size_in_time_is_found_and_kept():
    device = Device(base=0.004, per_token=20e-6)  # 256: 9.1 ms, 1,024: 24 ms
    taken = sizes_taken(StepBudget(SIZES, target=0.015), device, 1000)
    assert taken.count(256) > 950
    assert sum(size > 256 for size in taken) <= 10  # tried, at the start and now and then


def test_the_largest_size_of_all_is_taken_if_it_is_in_time():
    taken = sizes_taken(StepBudget(SIZES, target=0.1), Device(base=0.004, per_token=20e-6), 100)
    assert taken[20:] == [2048] * 80


def test_a_change_of_the_device_is_followed():
    budget, device = StepBudget(SIZES, target=0.015), Device(base=0.004, per_token=20e-6)
    sizes_taken(budget, device, 500)
    device.base = 0.012  # contexts have grown: 64: 13.3 ms, 256: 17.1 ms
    assert sizes_taken(budget, device, 200)[-100:].count(64) > 90
    device.base = 0.001
    assert sizes_taken(budget, device, 2000)[-500:].count(256) > 450


def test_one_slow_step_changes_little():
    budget, device = StepBudget(SIZES, target=0.015), Device(base=0.004, per_token=20e-6)
    sizes_taken(budget, device, 500)
    budget.observe(256, 1.0)
    assert sizes_taken(budget, device, 500).count(256) > 350


def test_a_target_that_cannot_be_kept_leaves_the_least_that_goes_on():
    budget, device = StepBudget(SIZES, target=0.001), Device(base=0.004, per_token=20e-6)
    assert set(sizes_taken(budget, device, 200)[2:]) == {16}
    # 20 decoding sequences fill the smallest size by themselves: a prompt gets what is left of the next.
    assert set(sizes_taken(budget, device, 200, num_decoding=20)) == {64}


@pytest.mark.parametrize("target", [None, 0.015])
def test_the_scheduler_gives_decoding_sequences_their_tokens_at_the_target(target):
    """A stream of prompts beside 8 streams of tokens: with the target the streams keep to it, without it they don't."""
    scheduler = Scheduler(
        PageAllocator(10_000),
        page_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_pages_per_sequence=1000,
        step_budget=StepBudget(SIZES, target),
    )
    device, late, num_steps = Device(base=0.004, per_token=20e-6), 0, 0
    for sequence_id in range(8):
        scheduler.add(Sequence(sequence_id, [1], SamplingParams(), seed=0, max_len=10_000))
    scheduler.update(scheduler.schedule(), [5] * 8)
    for sequence_id in range(8, 40):
        scheduler.add(Sequence(sequence_id, [1] * 3000, SamplingParams(), seed=0, max_len=3001))
    while scheduler.num_running + scheduler.num_waiting > 8:
        plan = scheduler.schedule()
        assert sum(chunk.is_decode for chunk in plan.chunks) == 8
        seconds = device.seconds(plan.num_tokens)
        scheduler.step_budget.observe(plan.num_tokens, seconds)
        scheduler.update(plan, [5] * len(plan.samples))
        late, num_steps = late + (seconds > 0.015), num_steps + 1
    assert late / num_steps <= 0.02 if target else late / num_steps >= 0.9
