"""Steps of a running engine under jax.profiler, read back as kernels by time and as the device's idle time."""

import tempfile
import time
from pathlib import Path
from typing import Any

from miniinfer_jax.benchmark.hlo_text import Cost, read_programs
from miniinfer_jax.benchmark.kernel_table import device_times, kernel_rows
from miniinfer_jax.benchmark.kernel_trace import read_events, recorded, wait_for_device
from miniinfer_jax.benchmark.roofline import Ceilings


def time_steps(engine: Any, num_steps: int) -> float:
    """Wall seconds a step of the engine's next steps, from an idle device to an idle device."""
    wait_for_device()
    started_at = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    wait_for_device()
    return (time.perf_counter() - started_at) / num_steps


def profile_steps(
    llm: Any,
    num_steps: int,
    wall_seconds: float,
    ceilings: Ceilings,
    attention_cost: Cost | None = None,
    num_rows: int | None = None,
) -> dict[str, Any]:
    """Traces the engine's next steps; times in seconds a step.

    wall_seconds: of a step that was not traced. The trace may slow steps down (jax 0.10 launches kernel by kernel
    instead of as one CUDA graph), so busy_share_of_wall, the kernels' time over wall_seconds, stands beside idle_share.
    num_rows: sequences of each step where all are decode steps of as many.
    """
    with tempfile.TemporaryDirectory() as folder:
        with recorded(Path(folder)):
            num_before = llm.engine.stats().num_steps
            for _ in range(num_steps):
                llm.engine.step()
            num_dispatched = llm.engine.stats().num_steps - num_before
        events = read_events(Path(folder))
    if not events or not num_dispatched:
        raise ValueError(f"the trace of {num_dispatched} steps holds {len(events)} kernels; profile more requests")
    times = device_times(events, num_dispatched)
    instructions = read_programs(llm.engine.program_texts(num_rows))
    page_bytes = llm.engine.device_arrays_bytes()["pages"] // llm.model_config.num_layers
    step_seconds = times["device_seconds_per_step"] or times["busy_seconds_per_step"]
    return {
        **times,
        "wall_seconds_per_step": wall_seconds,
        "busy_share_of_wall": times["busy_seconds_per_step"] / wall_seconds,
        "kernels": kernel_rows(
            events, num_dispatched, step_seconds, ceilings, instructions, attention_cost, page_bytes
        ),
    }
