"""scripts/bench_kernels.py rehearsed on the CPU: every kernel beside its definition."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_kernel_stands_beside_its_definition():
    command = [sys.executable, ROOT / "scripts" / "bench_kernels.py", "--small"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert finished.returncode == 0, finished.stderr
    ceilings, *rows = map(json.loads, finished.stdout.splitlines())
    assert ceilings["matmul_teraflops"] > 0 and ceilings["read_gigabytes"] > 0
    assert {row["shape"].split(",")[0] for row in rows} == {"prefill 1 x 24", "prefill 1 x 24 on 40", "decode 1 x 24"}
    for row in rows:
        assert "failed" not in row, row
        assert row["difference"] < 1e-2 and row["share"] > 0
        assert (row["gigabytes_per_second"] if "decode" in row["shape"] else row["teraflops"]) > 0
    assert [row["implementation"] for row in rows if row["implementation"] != "torch"] == ["xla", "pallas"] * 3
