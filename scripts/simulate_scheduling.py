"""Scheduling policies compared without a device: the engine's own scheduler, simulated time, seeded arrivals.

python scripts/simulate_scheduling.py                          # a table
python scripts/simulate_scheduling.py --json                   # a JSON line a row
python scripts/simulate_scheduling.py --plot completion.png    # and how many requests were done how soon
python scripts/simulate_scheduling.py --num-requests 300       # smaller

Prompts and outputs are log-normal, most of them short and a few very long. The policy doesn't know how long an output
will be; it has a guess that is off by a factor of 1.6 either way (one standard deviation). One request in ten is
urgent. Four tenants; in the last workload all of them ask for more than their fourth of the engine, and one for six
times as much as each of the others.

The load is relative to what the engine does when all requests come at once. The fairness index is Jain's, over the
service of the tenants until the last request has come: 1 if all got the same, 0.25 if one got everything.
"""

import json
import math
import random
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from miniinfer_jax.benchmark.plot import check_can_plot
from miniinfer_jax.cli import run
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.policies import OUTPUT_TOKEN_COST, POLICIES, PROMPT_TOKEN_COST, make_policy
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence, StepPlan

EOS = 0
OTHER_TOKEN = 1
PARAMS = SamplingParams(max_tokens=None)
MAX_MODEL_LEN = 8192
NUM_SLOTS, NUM_PAGES, PAGE_SIZE, TOKEN_BUDGET = 32, 2000, 16, 2048

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step: the weights are read once or the tokens' products take longer, and each context is read.

    The figures are the roofline of a model of 7.6 G parameters in bfloat16, 28 layers of 4 key-value heads of 128, at
    3.35 TB/s and 800 TFLOP/s.
    """

    weights: float = 4.5e-3
    per_token: float = 19e-6
    per_context_token: float = 17e-9

    def seconds(self, plan: StepPlan) -> float:
        num_context_tokens = sum(chunk.start + chunk.length for chunk in plan.chunks)
        return max(self.weights, self.per_token * plan.num_tokens) + self.per_context_token * num_context_tokens


@dataclass(frozen=True)
class Workload:
    """How requests come: `burstiness` is the coefficient of variation of the times between them, 1 for Poisson."""

    name: str
    load: float
    burstiness: float = 1.0
    tenant_rates: tuple[int, ...] = (1, 1, 1, 1)

    @property
    def is_contended(self) -> bool:
        """Whether every tenant asks for more than an equal share, so that the service they get can be compared."""
        return self.load * min(self.tenant_rates) / sum(self.tenant_rates) > 1 / len(self.tenant_rates)


WORKLOADS = (
    Workload("poisson", load=1.0),
    Workload("bursty", load=1.0, burstiness=4.0),
    Workload("contended", load=2.5, tenant_rates=(6, 1, 1, 1)),
)


@dataclass(frozen=True)
class Job:
    """A request: how long it is in truth, and what the scheduler is told."""

    arrival: float  # seconds
    prompt_len: int
    output_len: int
    expected_output_len: int
    priority: int
    tenant: str


@dataclass(frozen=True)
class Outcome:
    """One policy under one workload. Seconds, but for the index (None where tenants can't be compared) and counts."""

    workload: str
    policy: str
    mean_ttft: float
    p99_ttft: float
    urgent_p99_ttft: float
    mean_completion: float
    p99_completion: float
    fairness_index: float | None
    num_preemptions: int
    seconds: float


def make_jobs(workload: Workload, num_requests: int, capacity: float, seed: int) -> list[Job]:
    """Requests in order of arrival, `workload.load` times `capacity` a second."""
    generator = random.Random(seed)
    tenants = [f"tenant-{number}" for number in range(len(workload.tenant_rates))]
    shape = 1 / workload.burstiness**2  # of a gamma distribution with this coefficient of variation
    mean_gap = 1 / (workload.load * capacity)
    now, jobs = 0.0, []
    for _ in range(num_requests):
        now += generator.gammavariate(shape, mean_gap / shape)
        prompt_len = min(4000, math.ceil(generator.lognormvariate(math.log(150), 1.0)))
        output_len = min(4000, math.ceil(generator.lognormvariate(math.log(80), 1.4)))
        guess = max(1, round(output_len * generator.lognormvariate(0, math.log(1.6))))
        priority = 0 if generator.random() < 0.1 else 1
        tenant = generator.choices(tenants, workload.tenant_rates)[0]
        jobs.append(Job(now, prompt_len, output_len, guess, priority, tenant))
    return jobs


class Simulation:
    """Jobs through one scheduler; every step takes what the cost model says."""

    def __init__(self, jobs: list[Job], policy: str, cost: CostModel) -> None:
        self.scheduler = Scheduler(
            PageAllocator(NUM_PAGES),
            page_size=PAGE_SIZE,
            max_num_seqs=NUM_SLOTS,
            max_num_batched_tokens=TOKEN_BUDGET,
            max_pages_per_sequence=MAX_MODEL_LEN // PAGE_SIZE,
            policy=make_policy(policy),
            enable_prefix_caching=True,
        )
        self.jobs = jobs
        self.cost = cost
        self.now = 0.0
        self.full_until = 0.0  # a request waited until then
        self.service: Counter[str] = Counter()  # by tenant, until the last job came
        self.first_token_times: dict[int, float] = {}  # by index of the job
        self.finished_times: dict[int, float] = {}
        self._num_served: Counter[int] = Counter()  # tokens of a job that were computed once

    def run(self) -> None:
        num_arrived = 0
        while num_arrived < len(self.jobs) or self.scheduler.has_work:
            while num_arrived < len(self.jobs) and self.jobs[num_arrived].arrival <= self.now:
                self.scheduler.add(self._sequence(num_arrived))
                num_arrived += 1
            plan = self.scheduler.schedule()
            if not plan.chunks:
                self.now = self.jobs[num_arrived].arrival
                continue
            self.scheduler.prefetch()
            self.now += self.cost.seconds(plan)
            if self.scheduler.num_waiting > 0:
                self.full_until = self.now
            if num_arrived < len(self.jobs):
                self._count_service(plan)
            self._read(plan)

    def _sequence(self, index: int) -> Sequence:
        job = self.jobs[index]
        return Sequence(
            sequence_id=index,
            prompt_token_ids=[OTHER_TOKEN + 1 + index] * job.prompt_len,  # nobody shares a prompt with another
            params=PARAMS,
            seed=0,
            max_len=MAX_MODEL_LEN,
            eos_token_ids=(EOS,),
            priority=job.priority,
            tenant=job.tenant,
            expected_output_len=job.expected_output_len,
        )

    def _read(self, plan: StepPlan) -> None:
        sampled = [sequence for _, sequence in plan.samples]
        lengths = [(len(s.output_token_ids) + 1, self.jobs[s.sequence_id].output_len) for s in sampled]
        tokens = [EOS if length >= output_len else OTHER_TOKEN for length, output_len in lengths]
        for sequence in self.scheduler.update(plan, tokens):
            self.finished_times[sequence.sequence_id] = self.now
        for sequence in sampled:
            self.first_token_times.setdefault(sequence.sequence_id, self.now)

    def _count_service(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            index, end = chunk.sequence.sequence_id, chunk.start + chunk.length
            for position in range(max(chunk.start, self._num_served[index]), end):
                cost = PROMPT_TOKEN_COST if position < chunk.sequence.prompt_len else OUTPUT_TOKEN_COST
                self.service[chunk.sequence.tenant] += cost
            self._num_served[index] = max(self._num_served[index], end)


def jains_index(values: list[float]) -> float:
    """(sum x)^2 / (n sum x^2), of Jain, Chiu and Hawe, 1984: 1 if all are equal, 1/n if one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure_capacity(num_requests: int, cost: CostModel, seed: int) -> float:
    """Requests a second when all of them are there from the start, while there are enough of them."""
    jobs = make_jobs(Workload("all at once", load=1.0), num_requests, capacity=1e12, seed=seed)
    simulation = Simulation(jobs, "fcfs", cost)
    simulation.run()
    num_finished = sum(time <= simulation.full_until for time in simulation.finished_times.values())
    return num_finished / simulation.full_until


def simulate(workload: Workload, policy: str, jobs: list[Job]) -> tuple[Outcome, list[float]]:
    """What a policy makes of a workload, and the completion time of each job."""
    simulation = Simulation(jobs, policy, CostModel())
    simulation.run()
    ttfts = [simulation.first_token_times[index] - job.arrival for index, job in enumerate(jobs)]
    urgent_ttfts = [ttft for ttft, job in zip(ttfts, jobs, strict=True) if job.priority == 0]
    completions = [simulation.finished_times[index] - job.arrival for index, job in enumerate(jobs)]
    is_contended = workload.is_contended
    outcome = Outcome(
        workload=workload.name,
        policy=policy,
        mean_ttft=statistics.fmean(ttfts),
        p99_ttft=percentile(ttfts, 0.99),
        urgent_p99_ttft=percentile(urgent_ttfts, 0.99),
        mean_completion=statistics.fmean(completions),
        p99_completion=percentile(completions, 0.99),
        fairness_index=jains_index(list(simulation.service.values())) if is_contended else None,
        num_preemptions=simulation.scheduler.num_preemptions,
        seconds=simulation.now,
    )
    return outcome, completions


def print_table(outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("workload", "policy", title="seconds; completion: from arrival to the last token")
    for column in ("mean TTFT", "p99 TTFT", "p99 urgent", "mean completion", "p99 completion", "Jain", "preempted"):
        table.add_column(column, justify="right")
    for o in outcomes:
        times = (o.mean_ttft, o.p99_ttft, o.urgent_p99_ttft, o.mean_completion, o.p99_completion)
        index = "" if o.fairness_index is None else f"{o.fairness_index:.2f}"
        is_last = o.policy == list(POLICIES)[-1]
        table.add_row(
            o.workload, o.policy, *(f"{time:.2f}" for time in times), index, f"{o.num_preemptions}", end_section=is_last
        )
    Console().print(table)


def draw(path: Path, completions: dict[tuple[str, str], list[float]]) -> None:
    """A PNG: for each workload, which share of the requests was complete how many seconds after it came."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(workload for workload, _ in completions))
    figure = Figure(figsize=(5 * len(workloads), 4), dpi=150, layout="constrained")
    for axes, workload in zip(figure.subplots(1, len(workloads), squeeze=False)[0], workloads, strict=True):
        for (name, policy), times in completions.items():
            if name == workload:
                shares = [(rank + 1) / len(times) for rank in range(len(times))]
                axes.semilogx(sorted(times), shares, label=policy)
        axes.set(title=workload, xlabel="seconds to complete", ylabel="share of requests")
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize="small")
    figure.savefig(path)


@app.command()
def simulate_scheduling(
    num_requests: Annotated[int, typer.Option(help="Requests of each workload.", min=50)] = 3000,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line a row.")] = False,
    plot: Annotated[Path | None, typer.Option(help="A PNG of the times to completion.")] = None,
) -> None:
    """Every policy under every workload."""
    if plot is not None:
        check_can_plot(plot)
    capacity = measure_capacity(num_requests, CostModel(), seed)
    outcomes, completions = [], {}
    for workload in WORKLOADS:
        jobs = make_jobs(workload, num_requests, capacity, seed)
        for policy in POLICIES:
            outcome, completions[workload.name, policy] = simulate(workload, policy, jobs)
            outcomes.append(outcome)
            if as_json:
                print(json.dumps(asdict(outcome)), flush=True)
    if not as_json:
        print_table(outcomes)
    if plot is not None:
        draw(plot, completions)


if __name__ == "__main__":
    run(app)
