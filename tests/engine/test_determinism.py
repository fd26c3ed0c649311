"""deterministic=True: the tokens and the log-probabilities of a request are bitwise those that it has alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]


# What the GPU's kernels take: heads of 64.
WIDE = {"hidden_size": 256, "intermediate_size": 512}


@pytest.mark.parametrize(
    ("platform", "dtype", "num_requests", "changes"),
    [
        ("cpu", "float32", 33, {}),
        ("cpu", "bfloat16", 33, {}),
        pytest.param("cuda", "bfloat16", 256, WIDE, marks=pytest.mark.gpu),
    ],
)
def test_a_result_depends_on_the_request_alone(platform, dtype, num_requests, changes, tmp_path):
    folder = make_checkpoint(tmp_path / "tiny", **changes)
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/engine/determinism_check.py"), str(folder), dtype, str(num_requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.pop("num_preemptions") > 3
    assert report.pop("num_cached_tokens") > 30 * num_requests
    assert report.pop("num_distinct") == num_requests
    assert report == {name: [] for name in report}
    assert len(report) == 11
