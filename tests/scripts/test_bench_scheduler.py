"""scripts/bench_scheduler.py rehearsed: a row for every policy and length of the queue."""

import json
import os
import subprocess
import sys
from pathlib import Path

from miniinfer_jax.engine.policies import POLICIES

ROOT = Path(__file__).parents[2]


def test_every_policy_is_timed():
    command = [sys.executable, ROOT / "scripts" / "bench_scheduler.py"]
    command += ["--num-running", "8", "--queued", "0,50", "--num-steps", "20"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert finished.returncode == 0, finished.stderr
    *rows, _, missed, _, hit = map(json.loads, finished.stdout.splitlines())
    assert [(row["policy"], row["num_queued"]) for row in rows] == [(p, queued) for p in POLICIES for queued in (0, 50)]
    for row in rows:
        assert 0 < row["schedule_ms"] < row["step_ms"] <= row["p99_ms"]
    assert missed["is_prefetched"] and hit["is_prefetched"] and hit["is_hit"] and not missed["is_hit"]
    assert min(missed["start_ms"], hit["start_ms"]) > 0
