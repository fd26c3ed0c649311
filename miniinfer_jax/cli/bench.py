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
NUM_KERNELS_PRINTED = 20

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Profile = Annotated[
    bool, typer.Option("--profile", help="Run steps once more under the profiler: kernels by time, idle time.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw the roofline into this .png (needs matplotlib).")]

app = typer.Typer(help="Measure speed beside the device's ceilings.", no_args_is_help=True, rich_markup_mode=None)


@contextmanager
def opened_llm(
    engine: EngineOptions, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int
) -> Iterator[tuple[Any, dict[str, Any], Any]]:
    """The LLM to measure, the description of the run, and the device's ceilings.

    A published shape's name stands for its random weights. The ceilings are measured first, while the device's
    memory is still free. When the block ends, the description also says what the memory went to.
    """
    from miniinfer_jax.benchmark.ceilings import measure_ceilings
    from miniinfer_jax.benchmark.memory_report import memory_report, peak_bytes
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
        peak_before, started_at = peak_bytes(), time.perf_counter()
        llm = options.open_llm(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            skip_tokenizer_init=is_shape,
            enable_prefix_caching=False,  # runs over the same prompts are to compute the same
        )
        startup_seconds = time.perf_counter() - started_at
        run = describe_run(llm, engine.model, ceilings, startup_seconds)
        yield llm, run, ceilings
        run["memory"] = memory_report(llm, peak_before)


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
    profile: Profile = False,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Tokens a second over many requests of mixed lengths (the defaults are nano-vllm's benchmark).

    --model also takes a published shape (qwen2.5-0.5b, qwen2.5-7b, ...), with random weights.
    """
    from miniinfer_jax.benchmark.plot import check_can_plot
    from miniinfer_jax.benchmark.throughput import Workload, measure_throughput, profile_throughput

    if plot:
        check_can_plot(plot)
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
        if profile:
            figures["profile"] = profile_throughput(llm, workload, figures["num_steps"], ceilings)
    if plot:
        _plot(plot, run, [("whole run", figures["roofline"], figures["seconds"])])
    if as_json:
        print(json.dumps({**run, **figures}))
    else:
        _print_run(run)
        _print_throughput(figures)
        _print_memory(run["memory"])
        _print_profiles({"in the middle of the run": figures.get("profile")})


@app.command()
@flatten_options
def latency(
    engine: EngineOptions,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8,32",
    input_len: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens to time for each, once all are decoding.")] = 64,
    profile: Profile = False,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Time to the first token, and time a token after it, by batch size.

    --model also takes a published shape (qwen2.5-0.5b, qwen2.5-7b, ...), with random weights.
    """
    from miniinfer_jax.benchmark.plot import check_can_plot

    if plot:
        check_can_plot(plot)
    run, rows = run_latency(engine, parse_sizes(batch_sizes), input_len, output_len, profile=profile)
    if plot:
        _plot(plot, run, [point for row in rows for point in _latency_points(row)])
    if as_json:
        print(json.dumps({**run, "latencies": rows}))
    else:
        _print_run(run)
        _print_latencies(rows)
        _print_memory(run["memory"])
        _print_profiles({f"decode, batch {row['batch_size']}": row.get("profile") for row in rows})


def parse_sizes(text: str) -> list[int]:
    """Positive integers from '1,8,32'. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no comma-separated list of positive integers, such as 1,8,32")
    return [int(part) for part in parts]


def run_latency(
    engine: EngineOptions, batch_sizes: list[int], input_len: int, output_len: int, *, profile: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The description of the run, and the figures of each batch size, in one engine."""
    from miniinfer_jax.benchmark.latency import measure_latency, profile_latency, steps_to_start

    if input_len < 1 or output_len < 1:
        raise ValueError(f"input_len is {input_len} and output_len {output_len}; both must be at least 1")
    largest = max(batch_sizes)
    budget = engine.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS
    # Who starts first decodes until the last one starts: that needs room too.
    longest = input_len + steps_to_start(largest, input_len, budget) + output_len + 8
    with opened_llm(engine, largest, longest, budget) as (llm, run, ceilings):
        rows = [measure_latency(llm, size, input_len, output_len, ceilings) for size in batch_sizes]
        for row in rows if profile else []:  # after all that is timed: a profiler that was on may leave its mark
            row["profile"] = profile_latency(llm, row, output_len, ceilings)
    return run, rows


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
        f"{figures['num_steps']} steps, {figures['seconds']:.2f} s"
    )
    print(
        f"{figures['output_tokens_per_second']:,.0f} output tokens/s; "
        f"roofline {roofline['output_tokens_per_second']:,.0f}, share {roofline['share']:.1%}"
    )
    print(ROOFLINE_HEADER)
    for name in ("prefill", "decode"):
        print(f"{name:<26}" + _cost_columns(roofline[name]))  # timed together only
    print(f"{'whole run':<26}" + _roofline_columns(figures["seconds"], roofline))


def _print_latencies(rows: list[dict[str, Any]]) -> None:
    print(ROOFLINE_HEADER)
    for row in rows:
        for name, roofline, seconds in _latency_points(row):
            print(f"{name:<26}" + _roofline_columns(seconds, roofline))
    print("  ".join(f"batch {row['batch_size']}: {row['tokens_per_second']:,.0f} tokens/s" for row in rows))


def _latency_points(row: dict[str, Any]) -> list[tuple[str, dict[str, Any], float]]:
    """Name, roofline and seconds of the two figures of a batch size."""
    name = f"batch {row['batch_size']}, "
    return [
        (name + "first token", row["prefill_roofline"], row["seconds_to_last_first_token"]),
        (name + "a token", row["decode_roofline"], row["seconds_per_token"]),
    ]


ROOFLINE_HEADER = (
    f"{'':<26}{'GB':>11}{'GFLOP':>13}{'least ms':>12}{'ms':>12}{'share':>8}{'of read':>9}{'of matmul':>11}"
)


def _cost_columns(cost: dict[str, Any]) -> str:
    return f"{cost['num_bytes'] / 1e9:>11.4f}{cost['operations'] / 1e9:>13.3f}{cost['least_seconds'] * 1e3:>12.4f}"


def _roofline_columns(seconds: float, roofline: dict[str, Any]) -> str:
    shares = f"{roofline['share']:>8.1%}{roofline['read_share']:>9.1%}{roofline['matmul_share']:>11.1%}"
    return f"{_cost_columns(roofline)}{seconds * 1e3:>12.3f}{shares}"


def _print_memory(memory: dict[str, int | None]) -> None:
    def megabytes(name: str) -> str:
        size = memory[f"{name}_bytes"]
        return "unknown" if size is None else f"{size / 1e6:,.1f} MB"

    print(
        f"device memory: peak {megabytes('peak')}; weights {megabytes('weight')}, pages {megabytes('page')}, "
        f"state {megabytes('state')}, workspace {megabytes('workspace')}"
    )


def _print_profiles(profiles: dict[str, dict[str, Any] | None]) -> None:
    """The profiles that were made, by what they are of."""
    for name, profile in profiles.items():
        if profile:
            _print_profile(name, profile)


def _print_profile(name: str, profile: dict[str, Any]) -> None:
    print(f"\nprofile: {name}, {profile['num_steps']} steps")
    print(
        f"a step: {profile['wall_seconds_per_step'] * 1e3:.3f} ms not traced, of which kernels take "
        f"{profile['busy_seconds_per_step'] * 1e3:.3f} ms ({profile['busy_share_of_wall']:.1%})"
    )
    if profile["device_seconds_per_step"] is None:
        print("traced: the trace does not tell one step from the next")
    else:
        print(
            f"traced: {profile['device_seconds_per_step'] * 1e3:.3f} ms on the device; idle between steps "
            f"{profile['idle_share']:.1%}, between kernels {profile['idle_share_within_steps']:.1%}"
        )
    print(f"{'kernel':<44}{'stage':<24}{'a step':>8}{'us':>11}{'share':>8}{'ceiling':>9}")
    for row in profile["kernels"][:NUM_KERNELS_PRINTED]:
        reached = "" if row["ceiling_share"] is None else f"{row['ceiling_share']:.1%}"
        print(
            f"{row['kernel'][:43]:<44}{row['stage'][:23]:<24}{row['count_per_step']:>8.1f}"
            f"{row['seconds_per_step'] * 1e6:>11.2f}{row['share']:>8.1%}{reached:>9}"
        )
    others = profile["kernels"][NUM_KERNELS_PRINTED:]
    if others:
        count, seconds, share = (
            sum(row[key] for row in others) for key in ("count_per_step", "seconds_per_step", "share")
        )
        print(f"{f'{len(others)} others':<68}{count:>8.1f}{seconds * 1e6:>11.2f}{share:>8.1%}")


def _plot(path: Path, run: dict[str, Any], points: list[tuple[str, dict[str, Any], float]]) -> None:
    from miniinfer_jax.benchmark.plot import PlotPoint, draw_roofline
    from miniinfer_jax.benchmark.roofline import Ceilings

    draw_roofline(
        path,
        f"{run['model']} ({run['dtype']}) on {run['device']}",
        Ceilings(**run["ceilings"]),
        [PlotPoint(name, roofline["num_bytes"], roofline["operations"], seconds) for name, roofline, seconds in points],
    )
