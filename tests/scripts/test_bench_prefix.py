"""scripts/bench_prefix.py rehearsed: the same tokens with the cache off and on, and nearly all of them found."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_requests_that_share_a_system_prompt():
    sizes = "--num-requests 6 --system-len 100 --question-len 8 --num-tokens 3 --max-num-seqs 4"
    command = [sys.executable, str(ROOT / "scripts/bench_prefix.py"), *sizes.split()]
    command += ["--num-cached-pages", "500", "--lookup-len", "400", "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(finished.stdout)
    assert figures["same_tokens"]
    assert figures["off"]["prompt_tokens"] == figures["on"]["prompt_tokens"] == 6 * 108
    assert figures["off"]["cached_tokens"] == 0
    assert figures["on"]["cached_tokens"] >= 5 * 96  # six full pages
    assert figures["speedup"] > 0 and figures["lookup"]["median_milliseconds"] > 0
