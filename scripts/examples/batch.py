"""Answer a file of requests, as `miniinfer generate --input --output` does; run again, it goes on where it was."""

import json
import tempfile
from pathlib import Path

from miniinfer_jax import LLM
from miniinfer_jax.batch_file import run_batch_file

with tempfile.TemporaryDirectory() as folder:
    requests, results = Path(folder) / "requests.jsonl", Path(folder) / "results.jsonl"
    lines = [{"prompt": f"{number} + {number} =", "max_tokens": 8, "custom_id": f"sum-{number}"} for number in range(5)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_batch_file(lambda: LLM("demo", max_num_seqs=8), requests, results, {"temperature": 0}, window=16)
    for line in results.read_text().splitlines():
        result = json.loads(line)
        print(result["custom_id"], repr(result["outputs"][0]["text"]))
