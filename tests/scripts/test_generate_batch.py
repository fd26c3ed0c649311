"""scripts/generate_batch.py as a process: killed for real in the middle, and gone on with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from miniinfer_jax.benchmark.shapes import write_shape

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate_batch.py"
NUM_REQUESTS = 40
MINUTES = 60.0


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_run_goes_on_without_losing_or_repeating_a_line(tmp_path):
    input, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt_token_ids": [number + 1], "max_tokens": 100}) for number in range(NUM_REQUESTS)]
    input.write_text("\n".join(lines[:-1] + ["{broken"]) + "\n")
    model = write_shape("tiny", tmp_path)
    sizes = "--max-num-seqs 2 --max-num-batched-tokens 16 --max-model-len 128 --num-pages 16"
    flags = f"--load-format dummy {sizes} --ignore-eos --json"
    command = [sys.executable, SCRIPT, input, output, "--model", model, *flags.split()]

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 5 * MINUTES
        while count_lines(output) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    num_before = count_lines(output)
    assert num_before < NUM_REQUESTS, "it was over before it was killed"

    finished = subprocess.run(command, capture_output=True, text=True, timeout=5 * MINUTES)
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout)
    assert summary["num_already_done"] == num_before
    assert summary["num_finished"] + summary["num_failed"] == NUM_REQUESTS - num_before
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(result["line"] for result in results) == list(range(1, NUM_REQUESTS + 1))
    assert [result["line"] for result in results if result["error"]] == [NUM_REQUESTS]
