"""scripts/bench_skinny_linear.py rehearsed on the CPU: every product by the kernel beside XLA's."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_product_stands_beside_xla_s():
    command = [sys.executable, ROOT / "scripts" / "bench_skinny_linear.py", "--small"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert finished.returncode == 0, finished.stderr
    header, *rows = map(json.loads, finished.stdout.splitlines())
    assert header["read_gigabytes"] > 0
    assert [row["product"] for row in rows] == ["qkv", "o", "gate_up", "down"]
    for row in rows:
        assert row["error"] < 1e-2
        assert {"xla_us", "xla_share", "kernel_us", "kernel_share"} <= row.keys()
