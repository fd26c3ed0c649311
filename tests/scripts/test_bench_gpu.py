"""`scripts/bench_gpu.py`, rehearsed on a tiny shape."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_row_is_a_line_with_its_rate_and_its_share_of_the_floor():
    command = [sys.executable, "scripts/bench_gpu.py", "--shape", "tiny", "--rows", "small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    description, *rows = map(json.loads, done.stdout.splitlines())
    assert description["model"] == "tiny"
    assert [row["row"] for row in rows] == ["B=1", "B=4", "prefill 4 x 32"]
    for row in rows[:2]:
        assert row["seconds_per_token"] > 0 and 0 < row["decode_roofline"]["share"] < 1
    assert rows[2]["prompt_tokens_per_second"] > 0 and 0 < rows[2]["prefill_roofline"]["share"] < 1
