"""The promises of the policies in simulated time: every number comes from a seed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from miniinfer_jax.engine.policies import POLICIES

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate_scheduling.py"
NUM_REQUESTS = 1000


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("simulate_scheduling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def outcome(script):
    capacity = script.measure_capacity(NUM_REQUESTS, script.CostModel(), seed=0)
    workloads = {workload.name: workload for workload in script.WORKLOADS}

    def simulated(workload: str, policy: str):
        jobs = script.make_jobs(workloads[workload], NUM_REQUESTS, capacity, seed=0)
        return script.simulate(workloads[workload], policy, jobs)[0]

    return simulated


def test_shortest_job_first_completes_a_quarter_sooner(outcome):
    for workload in ("poisson", "bursty"):
        assert outcome(workload, "sjf").mean_completion <= 0.75 * outcome(workload, "fcfs").mean_completion


def test_fair_serves_all_tenants_alike_where_first_come_first_served_does_not(outcome):
    assert outcome("contended", "fcfs").fairness_index < 0.7
    assert outcome("contended", "fair").fairness_index >= 0.95


def test_urgent_requests_and_newcomers_start_at_once(outcome):
    first_come = outcome("poisson", "fcfs")
    assert outcome("poisson", "priority").urgent_p99_ttft < 0.1 * first_come.urgent_p99_ttft
    newcomers_first = outcome("poisson", "multi_queue")
    assert newcomers_first.p99_ttft < 0.1 * first_come.p99_ttft
    assert newcomers_first.mean_completion < first_come.mean_completion


def test_jains_index(script):
    assert script.jains_index([3, 3, 3]) == pytest.approx(1)
    assert script.jains_index([5, 0, 0, 0]) == pytest.approx(1 / 4)


def test_the_script_prints_and_draws(script, tmp_path):
    plot = tmp_path / "completion.png"
    result = CliRunner().invoke(script.app, ["--num-requests", "60", "--json", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [(row["workload"], row["policy"]) for row in rows] == [
        (workload.name, policy) for workload in script.WORKLOADS for policy in POLICIES
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = CliRunner().invoke(script.app, ["--num-requests", "60"]).output
    assert all(policy in table for policy in ("fcfs", "sjf", "fair"))
