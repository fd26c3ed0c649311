"""deterministic=True: the tokens and the log-probabilities of a request are bitwise those that it has alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_depends_on_the_request_alone(dtype, tmp_path):
    folder = make_checkpoint(tmp_path / "tiny")
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/engine/determinism_check.py"), str(folder), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.pop("num_preemptions") > 3
    assert report.pop("num_distinct") == 33
    assert report == {name: [] for name in report}
    assert len(report) == 7
