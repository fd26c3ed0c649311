"""`miniinfer bench throughput|latency`: how fast, and how near to what the device can do."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from miniinfer_jax.cli.options import EngineOptions, flatten_options

THROUGHPUT_MAX_NUM_SEQS = 256
DEMO_MAX_LEN = 1024
MAX_NUM_BATCHED_TOKENS = 2048

app = typer.Typer(help="Measure speed beside the device's ceilings.", no_args_is_help=True, rich_markup_mode=None)


@contextmanager
def opened_llm(
    engine: EngineOptions, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int
) -> Iterator[tuple[Any, dict[str, Any], Any]]:
    """The LLM to measure, the description of the run, and the device's ceilings.

    A published shape's name stands for its random weights. The ceilings are measured first, while the device's
    memory is still free.
    """
    from miniinfer_jax.benchmark.ceilings import measure_ceilings
    from miniinfer_jax.benchmark.report import describe_run
    from miniinfer_jax.benchmark.shapes import SHAPES, write_shape
    from miniinfer_jax.engine.memory import default_device

    with tempfile.TemporaryDirectory() as folder:
        is_shape = engine.model in SHAPES
        options = engine
        if is_shape:
            options = replace(engine, model=str(write_shape(engine.model, Path(folder))), load_format="dummy")
        on_cpu = default_device(engine.gpu_memory_utilization).platform == "cpu"
        usual_dtype = "float32" if on_cpu else "bfloat16"
        ceilings = measure_ceilings(usual_dtype if engine.dtype == "auto" else engine.dtype)
        started_at = time.perf_counter()
        llm = options.open_llm(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            skip_tokenizer_init=is_shape,
        )
        startup_seconds = time.perf_counter() - started_at
        yield llm, describe_run(llm, engine.model, ceilings, startup_seconds), ceilings


@app.command()
@flatten_options
def throughput(
    engine: EngineOptions,
    num_requests: Annotated[int, typer.Option(help="How many requests.")] = 256,
    min_input: Annotated[int, typer.Option(help="Shortest prompt, tokens.")] = 100,
    max_input: Annotated[int, typer.Option(help="Longest prompt.")] = 1024,
    min_output: Annotated[int, typer.Option(help="Fewest tokens to generate.")] = 100,
    max_output: Annotated[int, typer.Option(help="Most tokens to generate.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Of the draws.")] = 0.6,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Tokens a second over many requests of mixed lengths (the defaults are nano-vllm's benchmark).

    --model also takes a published shape (qwen2.5-0.5b, qwen2.5-7b, ...), with random weights.
    """
    from miniinfer_jax.benchmark.throughput import Workload, measure_throughput

    workload = Workload(num_requests, min_input, max_input, min_output, max_output, temperature)
    max_num_seqs = engine.max_num_seqs or min(num_requests, THROUGHPUT_MAX_NUM_SEQS)
    longest = max_input + max_output
    if engine.model == "demo" and longest > DEMO_MAX_LEN:
        raise ValueError(
            f"the workload has requests of up to {longest} tokens, the demo model knows {DEMO_MAX_LEN}: "
            "add --max-input 512 --max-output 512, or name another --model"
        )
    with opened_llm(engine, max_num_seqs, longest, MAX_NUM_BATCHED_TOKENS) as (llm, run, ceilings):
        figures = measure_throughput(llm, workload, max_num_seqs, ceilings, use_tqdm=sys.stderr.isatty())
    if as_json:
        print(json.dumps({**run, **figures}))
    else:
        _print_run(run)
        _print_throughput(figures)


@app.command()
@flatten_options
def latency(
    engine: EngineOptions,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8,32",
    input_len: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens to time for each, once all are decoding.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time to the first token, and time a token after it, by batch size.

    --model also takes a published shape (qwen2.5-0.5b, qwen2.5-7b, ...), with random weights.
    """
    run, rows = run_latency(engine, parse_sizes(batch_sizes), input_len, output_len)
    if as_json:
        print(json.dumps({**run, "latencies": rows}))
    else:
        _print_run(run)
        _print_latencies(rows)


def parse_sizes(text: str) -> list[int]:
    """Positive integers from '1,8,32'. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no comma-separated list of positive integers, such as 1,8,32")
    return [int(part) for part in parts]


def run_latency(
    engine: EngineOptions, batch_sizes: list[int], input_len: int, output_len: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The description of the run, and the figures of each batch size, in one engine."""
    from miniinfer_jax.benchmark.latency import measure_latency, steps_to_start

    if input_len < 1 or output_len < 1:
        raise ValueError(f"input_len is {input_len} and output_len {output_len}; both must be at least 1")
    largest = max(batch_sizes)
    budget = engine.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS
    # Who starts first decodes until the last one starts: that needs room too.
    longest = input_len + steps_to_start(largest, input_len, budget) + output_len + 8
    with opened_llm(engine, largest, longest, budget) as (llm, run, ceilings):
        return run, [measure_latency(llm, size, input_len, output_len, ceilings) for size in batch_sizes]


def _print_run(run: dict[str, Any]) -> None:
    ceilings = run["ceilings"]
    print(f"{run['model']} ({run['num_params'] / 1e6:,.1f} M parameters, {run['dtype']}) on {run['device']}")
    print(
        f"measured ceilings: {ceilings['bytes_per_second'] / 1e9:,.1f} GB/s read, "
        f"{ceilings['operations_per_second'] / 1e12:,.2f} TFLOP/s; start took {run['startup_seconds']:.1f} s"
    )


def _print_throughput(figures: dict[str, Any]) -> None:
    roofline = figures["roofline"]
    print(
        f"{figures['num_requests']} requests, {figures['prompt_tokens']} tokens in, {figures['output_tokens']} out, "
        f"{figures['seconds']:.2f} s"
    )
    print(
        f"{figures['output_tokens_per_second']:,.0f} output tokens/s; "
        f"roofline {roofline['output_tokens_per_second']:,.0f}, share {roofline['share']:.1%}"
    )


def _print_latencies(rows: list[dict[str, Any]]) -> None:
    print(f"{'batch':>6} {'first token':>14} {'roofline':>9} {'a token':>12} {'roofline':>9} {'tokens/s':>10}")
    for row in rows:
        print(
            f"{row['batch_size']:>6} {row['seconds_to_first_token'] * 1e3:>11.2f} ms "
            f"{row['prefill_roofline']['share']:>9.1%} {row['seconds_per_token'] * 1e3:>9.3f} ms "
            f"{row['decode_roofline']['share']:>9.1%} {row['tokens_per_second']:>10,.0f}"
        )
