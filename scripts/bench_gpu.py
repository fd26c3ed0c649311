"""The standing rows of benchmarks/RESULTS.md for one published shape on one GPU, with random weights; a JSON line each.

    python scripts/bench_gpu.py --shape qwen2.5-7b                  # this engine
    python scripts/bench_gpu.py --shape qwen2.5-7b --peer           # transformers `generate` on the same shape
    python scripts/bench_gpu.py --shape tiny --rows small           # rehearsal on a CPU

One process an engine: each takes the memory of the whole GPU.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from miniinfer_jax.cli import run
from miniinfer_jax.cli.bench import opened_llm
from miniinfer_jax.cli.options import EngineOptions


@dataclass(frozen=True)
class Row:
    """A batch of equal prompts. Rows of one output token time whole prompts, others first tokens and decode steps."""

    name: str
    batch_size: int
    input_len: int
    output_len: int


ROWS = {
    "decode": (Row("B=1, short", 1, 128, 128), Row("B=64, 1k", 64, 1024, 128), Row("B=256, 1k", 256, 1024, 64)),
    "prefill": (Row("prefill 32 x 4,096", 32, 4096, 1),),
    "small": (Row("B=1", 1, 16, 8), Row("B=4", 4, 32, 8), Row("prefill 4 x 32", 4, 32, 1)),
}
MAX_NUM_SEQS = 256

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def measure_ours(engine: EngineOptions, rows: list[Row], throughput: bool) -> None:
    """Every row in one engine, sized for the longest."""
    from miniinfer_jax.benchmark.latency import measure_latency, measure_prefill
    from miniinfer_jax.benchmark.throughput import Workload, measure_throughput

    # Who starts first decodes until the last one starts: that needs room beside the row's own tokens.
    longest = max([row.input_len + 2 * row.output_len + 64 for row in rows] + [2048] * throughput)
    max_num_seqs = min(MAX_NUM_SEQS, max([row.batch_size for row in rows] + [MAX_NUM_SEQS] * throughput))
    with opened_llm(engine, max_num_seqs, longest, engine.max_num_batched_tokens or 8192) as (
        llm,
        description,
        ceilings,
    ):
        print(json.dumps(description), flush=True)
        for row in rows:
            if row.output_len == 1:
                figures = measure_prefill(llm, row.batch_size, row.input_len, ceilings)
            else:
                figures = measure_latency(llm, row.batch_size, row.input_len, row.output_len, ceilings)
            print(json.dumps({"row": row.name, **figures}), flush=True)
        if throughput:
            figures = measure_throughput(llm, Workload(), max_num_seqs, ceilings, use_tqdm=False)
            print(json.dumps({"row": "nano-vllm's workload", **figures}), flush=True)


def measure_peer(shape: str, rows: list[Row]) -> None:
    """transformers' `generate` in bfloat16 on the same shape: seconds to the first token, and a decode step."""
    import torch
    import transformers

    from miniinfer_jax.benchmark.shapes import write_shape

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.AutoConfig.from_pretrained(write_shape(shape, Path(folder)))
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def seconds(row: Row, num_tokens: int) -> float:
        token_ids = torch.randint(0, config.vocab_size, (row.batch_size, row.input_len), device=device)
        with torch.inference_mode():
            started_at = time.perf_counter()
            model.generate(token_ids, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started_at

    print(json.dumps({"peer": f"transformers {transformers.__version__}, torch {torch.__version__}", "model": shape}))
    for row in rows:
        seconds(row, 2)
        first, all_tokens = seconds(row, 1), seconds(row, 1 + row.output_len)
        figures = {
            "seconds_to_first_token": first,
            "prompt_tokens_per_second": row.batch_size * row.input_len / first,
            "seconds_per_token": (all_tokens - first) / row.output_len,
        }
        print(json.dumps({"row": row.name, **figures}), flush=True)


@app.command()
def bench_gpu(
    shape: Annotated[str, typer.Option(help="A published shape.")] = "qwen3-0.6b",
    rows: Annotated[str, typer.Option(help="Comma-separated: decode, prefill, small.")] = "decode,prefill",
    throughput: Annotated[bool, typer.Option("--throughput", help="Also nano-vllm's workload.")] = False,
    peer: Annotated[bool, typer.Option("--peer", help="Measure transformers instead.")] = False,
    attention_backend: Annotated[str, typer.Option(help="Which attention kernels.")] = "auto",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Bitwise the same in any batch.")] = False,
) -> None:
    """Measures the rows of one shape."""
    unknown = [name for name in rows.split(",") if name not in ROWS]
    if unknown:
        raise ValueError(f"rows {', '.join(unknown)} are not known; known: {', '.join(ROWS)}")
    chosen = [row for name in rows.split(",") for row in ROWS[name]]
    if peer:
        measure_peer(shape, chosen)
    else:
        engine = EngineOptions(model=shape, attention_backend=attention_backend, deterministic=deterministic)
        measure_ours(engine, chosen, throughput)


if __name__ == "__main__":
    run(app)
