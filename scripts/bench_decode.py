"""Decode time a step of published shapes with random weights, by batch size, beside the roofline; a JSON line each.

python scripts/bench_decode.py --shapes qwen2.5-0.5b,qwen2.5-7b --batch-sizes 1,64,256 --context 1024
python scripts/bench_decode.py --shapes tiny --batch-sizes 1,4 --context 32 --num-tokens 8  # on a CPU
"""

import json
from typing import Annotated

import typer

from miniinfer_jax.cli import run
from miniinfer_jax.cli.bench import parse_sizes, run_latency
from miniinfer_jax.cli.options import EngineOptions

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def bench_decode(
    shapes: Annotated[str, typer.Option(help="Comma-separated names of published shapes.")] = "qwen2.5-0.5b,qwen2.5-7b",
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,64,256",
    context: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 1024,
    num_tokens: Annotated[int, typer.Option(help="Steps to time.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto: bfloat16, float32 on a CPU.")] = "auto",
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in a prefill step.")] = 8192,
    attention_backend: Annotated[str, typer.Option(help="Which attention kernels.")] = "auto",
) -> None:
    """Measures all batch sizes of a shape in one engine, as large as the largest needs."""
    for shape in shapes.split(","):
        engine = EngineOptions(
            model=shape,
            dtype=dtype,
            max_num_batched_tokens=max_num_batched_tokens,
            attention_backend=attention_backend,
        )
        description, rows = run_latency(engine, parse_sizes(batch_sizes), context, num_tokens)
        for row in rows:
            print(json.dumps({**description, **row}), flush=True)


if __name__ == "__main__":
    run(app)
