"""On a GPU a decode step is one CUDA graph, in which nothing waits for the host and no page or weight is copied."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
# Run in a process of its own: XLA reads the flags of its dump once. Prints bytes of the pages of a layer, then the
# bytes of temporaries of every decode program.
SCRIPT = """
import sys
from miniinfer_jax import LLM
llm = LLM(sys.argv[1], dtype="bfloat16", max_num_seqs=4, max_num_batched_tokens=16, num_pages=4096, page_size=64,
          max_model_len=512, skip_tokenizer_init=True, use_tqdm=False)
runner = llm.engine._runner
print(runner._cache.layers[0].nbytes, sum(page.nbytes for page in runner._cache.layers))
for bucket in runner._buckets.decode:
    memory = runner._programs[bucket].memory_analysis()
    print(memory.temp_size_in_bytes, memory.alias_size_in_bytes, int(bucket.is_plain))
"""


@pytest.mark.gpu
def test_a_decode_step_is_one_graph_and_copies_no_pages(tmp_path):
    folder = make_checkpoint(tmp_path / "tiny", hidden_size=256, intermediate_size=512)
    dump = tmp_path / "dump"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_hlo_module_re=.*decode_step.*",
        "PYTHONPATH": str(ROOT),
        "MINIINFER_CACHE_ROOT": str(tmp_path / "cache"),  # what comes from a cache is not dumped
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (layer_bytes, cache_bytes), *programs = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert sorted(is_plain for _, _, is_plain in programs) == [0, 1, 1]
    for temporary_bytes, aliased_bytes, _ in programs:
        assert temporary_bytes < layer_bytes / 4
        assert aliased_bytes >= cache_bytes

    texts = [path.read_text() for path in dump.glob("*decode_step*thunk_sequence_after_thunk_passes.txt")]
    assert len(texts) == 3
    assert not any(re.search(r"Host|Callback|Outfeed|Infeed", text) for text in texts)
    outermost = [re.findall(r"^\d+: (k\w+)", text, re.MULTILINE) for text in texts]
    assert outermost == [["kCommandBuffer"]] * 3
