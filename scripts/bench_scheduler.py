"""Host time of the scheduler a step, beside how many requests wait; a JSON line each. No device.

python scripts/bench_scheduler.py                                      # 256 running; 0, 1,000 and 10,000 queued
python scripts/bench_scheduler.py --policies fair --num-steps 2000
python scripts/bench_scheduler.py --num-running 8 --queued 0,50 --num-steps 20 --policies fcfs  # a rehearsal

A step is `schedule` and `update`: who goes on, who starts, pages, and the tokens of the step taken in, one for each
running sequence. In every tenth step a sequence ends and a waiting one starts. The times are medians; `mean_ms` and
`p99_ms` are those of the two together: all sequences begin a page in the same steps, one in 64, and these are long.

The last rows are of a plan in which one request of 4,000 tokens starts and nothing else happens, in a pool full of
cached pages: `is_hit`, all but 40 tokens are cached; `is_prefetched`, after `Scheduler.prefetch`, as in the engine.
"""

import json
import platform
import random
import statistics
import time
from typing import Annotated

import typer

from miniinfer_jax.cli import run
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import POLICIES, make_policy
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence

TOKEN = 7
PROMPT_LEN, MAX_LEN, PAGE_SIZE = 30, 2048, 64
NUM_TENANTS, NUM_PRIORITIES = 100, 3
START_LEN, START_TAIL = 4000, 40

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def make_sequence(sequence_id: int, prompt: list[int] | None = None) -> Sequence:
    prompt = prompt or [(sequence_id + position) % 1000 for position in range(PROMPT_LEN)]
    return Sequence(
        sequence_id=sequence_id,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=None),
        seed=0,
        max_len=max(MAX_LEN, len(prompt) + 1),
        eos_token_ids=(0,),
        priority=sequence_id % NUM_PRIORITIES,
        tenant=f"tenant-{sequence_id % NUM_TENANTS}",
        expected_output_len=10 + sequence_id % 900,
    )


def measure(policy: str, num_running: int, num_queued: int, num_steps: int) -> dict[str, float]:
    """Milliseconds a step, with the queue kept at its length."""
    scheduler = Scheduler(
        PageAllocator(num_running * MAX_LEN // PAGE_SIZE),
        page_size=PAGE_SIZE,
        max_num_seqs=num_running,
        max_num_batched_tokens=8192,
        max_pages_per_sequence=MAX_LEN // PAGE_SIZE,
        policy=make_policy(policy),
        enable_prefix_caching=True,
    )
    num_sequences = 0
    times = []
    for step in range(-10, num_steps):
        while scheduler.num_running + scheduler.num_waiting < num_running + (num_queued if step > -10 else 0):
            scheduler.add(make_sequence(num_sequences))
            num_sequences += 1
        start = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        samples = plan.samples
        tokens = [TOKEN] * len(samples)
        before_update = time.perf_counter()
        scheduler.update(plan, tokens)
        end = time.perf_counter()
        if step >= 0:
            times.append((scheduled - start, end - before_update))
        if step % 10 == 0:
            scheduler.finish(samples[step % len(samples)][1], "stop")
    both = sorted(scheduling + update for scheduling, update in times)
    return {
        "schedule_ms": statistics.median(scheduling for scheduling, _ in times) * 1e3,
        "update_ms": statistics.median(update for _, update in times) * 1e3,
        "step_ms": statistics.median(both) * 1e3,
        "mean_ms": statistics.fmean(both) * 1e3,
        "p99_ms": both[int(0.99 * len(both))] * 1e3,
    }


def measure_start(is_hit: bool, is_prefetched: bool, num_starts: int) -> float:
    """Milliseconds of the plan that starts a long request, the median."""
    generator = random.Random(0)
    num_pages = 10 * START_LEN // PAGE_SIZE
    scheduler = Scheduler(
        PageAllocator(num_pages),
        page_size=PAGE_SIZE,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_pages_per_sequence=num_pages,
        enable_prefix_caching=True,
    )
    common = [generator.randrange(50_000) for _ in range(START_LEN - START_TAIL)]
    times = []
    for number in range(-20, num_starts):
        tail = [generator.randrange(50_000) for _ in range(START_TAIL if is_hit else START_LEN)]
        sequence = make_sequence(number + 20, common + tail if is_hit else tail)
        scheduler.add(sequence)
        if is_prefetched:
            scheduler.prefetch()
        start = time.perf_counter()
        plan = scheduler.schedule()
        times.append(time.perf_counter() - start)
        scheduler.update(plan, [TOKEN])
        scheduler.abort(sequence)
    return statistics.median(times[20:]) * 1e3


@app.command()
def bench_scheduler(
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(POLICIES),
    num_running: Annotated[int, typer.Option(help="Sequences that decode.", min=1)] = 256,
    queued: Annotated[str, typer.Option(help="Comma-separated numbers of waiting sequences.")] = "0,1000,10000",
    num_steps: Annotated[int, typer.Option(help="Steps to time.", min=1)] = 500,
) -> None:
    """Times every policy with every length of the queue, and the start of a request."""
    for policy in policies.split(","):
        for num_queued in map(int, queued.split(",")):
            row = {"policy": policy, "num_running": num_running, "num_queued": num_queued}
            times = {
                name: round(value, 4) for name, value in measure(policy, num_running, num_queued, num_steps).items()
            }
            print(json.dumps({**row, **times, "python": platform.python_version()}), flush=True)
    for is_hit in (False, True):
        for is_prefetched in (False, True):
            row = {"start_of": START_LEN, "is_hit": is_hit, "is_prefetched": is_prefetched}
            print(
                json.dumps({**row, "start_ms": round(measure_start(is_hit, is_prefetched, num_steps), 4)}), flush=True
            )


if __name__ == "__main__":
    run(app)
