"""What the device did, from a trace of `jax.profiler`: one event for each time a kernel ran.

On a GPU a kernel is an event of a line "Stream #..." of the plane "/device:GPU:0"; on a CPU an operation of a program,
which XLA's client records as an event with an `hlo_op` on the thread that ran it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

GPU_PLANE = "/device:GPU:0"
CPU_PLANE = "/host:CPU"


@dataclass(frozen=True)
class KernelEvent:
    """One run of a kernel; times in nanoseconds of the trace's clock.

    op and module: the HLO instruction and program that it belongs to, "" for a copy outside of programs. run: which run
    of the program, where the trace tells. node: which kernel of a CUDA graph, None outside of one; its op is then the
    graph. self_ns: its time without that of events inside it (the body of a loop).
    """

    name: str
    start_ns: float
    end_ns: float
    self_ns: float
    op: str = ""
    module: str = ""
    program: str = ""
    run: int | None = None
    node: int | None = None
    num_bytes: float | None = None
    operations: float | None = None


def wait_for_device() -> None:
    """Returns when nothing that was dispatched is still being computed."""
    jax.block_until_ready(jax.live_arrays())


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Traces into a folder what the device does meanwhile, from idle to idle."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing Python would slow the host down, and it is the host's gaps that count
    wait_for_device()
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield
        wait_for_device()


def read_events(folder: Path) -> list[KernelEvent]:
    """The kernels of the one trace in a folder, by start."""
    (path,) = folder.rglob("*.xplane.pb")
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes}
    is_gpu = GPU_PLANE in planes
    plane = planes[GPU_PLANE if is_gpu else CPU_PLANE]
    events = []
    for line in plane.lines:
        if not is_gpu or line.name.startswith("Stream #"):
            events += kernels_of_line(line.events, is_gpu=is_gpu)
    return sorted(events, key=lambda event: event.start_ns)


def kernels_of_line(raw_events: Iterable[Any], *, is_gpu: bool) -> list[KernelEvent]:
    """The kernels among the events (name, start_ns, end_ns, stats) of a stream or of a thread."""
    kernels = []
    for raw in raw_events:
        stats = {str(name): value for name, value in raw.stats}
        is_kernel = is_gpu or ("hlo_op" in stats and not raw.name.startswith("end: "))
        if is_kernel and raw.end_ns > raw.start_ns:
            kernels.append(_kernel(raw, stats))
    return _without_nested(sorted(kernels, key=lambda kernel: (kernel.start_ns, -kernel.end_ns)))


def _kernel(raw: Any, stats: dict[str, Any]) -> KernelEvent:
    module = str(stats.get("hlo_module", ""))
    return KernelEvent(
        name=raw.name,
        start_ns=raw.start_ns,
        end_ns=raw.end_ns,
        self_ns=raw.end_ns - raw.start_ns,
        op=str(stats.get("hlo_op", "")),
        module=module,
        program=f"{module}({stats['program_id']})" if "program_id" in stats else module,
        run=stats.get("run_id"),
        node=stats.get("cuda_graph_node_id"),
        num_bytes=stats.get("bytes_accessed"),
        operations=stats.get("flops"),
    )


def _without_nested(kernels: list[KernelEvent]) -> list[KernelEvent]:
    """The kernels of a line, by start, with self_ns less the time of the kernels directly inside."""
    self_ns = [kernel.self_ns for kernel in kernels]
    open_ones: list[int] = []
    for index, kernel in enumerate(kernels):
        while open_ones and kernels[open_ones[-1]].end_ns <= kernel.start_ns:
            open_ones.pop()
        if open_ones and kernel.end_ns <= kernels[open_ones[-1]].end_ns:
            self_ns[open_ones[-1]] -= kernel.end_ns - kernel.start_ns
        open_ones.append(index)
    return [replace(kernel, self_ns=time) for kernel, time in zip(kernels, self_ns, strict=True)]
