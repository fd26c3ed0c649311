"""From the kernels of a trace to where a step's time goes: kernels by time, and how long the device stood idle.

Plain functions over `KernelEvent`s. Times in the results are in seconds.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from miniinfer_jax.benchmark.hlo_text import Cost, Instruction
from miniinfer_jax.benchmark.kernel_trace import KernelEvent
from miniinfer_jax.benchmark.roofline import Ceilings

_NUMBER = re.compile(r"([._]\d+)+$")
ATTENTION_STAGE = "attention"
Instructions = Mapping[tuple[str, str], Instruction]
Group = tuple[str, str, bool]  # kernel, stage, whether it is the kernel that reads the pages


def device_times(events: list[KernelEvent], num_steps: int) -> dict[str, Any]:
    """How a step's time is spent on the device, from the device's own timestamps, a step on average.

    idle_share: of the time from step to step, what passes between the last kernel of a step and the first of the next;
    idle_share_within_steps: between the kernels of a step. Both None where the trace does not show num_steps steps.
    """
    runs = split_runs([event for event in events if event.module] or events)
    spans = [(run[0].start_ns, max(event.end_ns for event in run)) for run in runs]
    busy = sum(_busy_ns(run) for run in runs)
    times: dict[str, Any] = {"num_steps": num_steps, "busy_seconds_per_step": busy / num_steps / 1e9}
    if len(runs) != num_steps or num_steps < 2:
        return {**times, "device_seconds_per_step": None, "idle_share": None, "idle_share_within_steps": None}
    length = sum(end - start for start, end in spans) / num_steps
    gaps = [max(0, after[0] - before[1]) for before, after in zip(spans, spans[1:], strict=False)]
    gap = sum(gaps) / len(gaps)
    return {
        **times,
        "device_seconds_per_step": (length + gap) / 1e9,
        "idle_share": gap / (length + gap),
        "idle_share_within_steps": (length - busy / num_steps) / (length + gap),
    }


def split_runs(events: list[KernelEvent]) -> list[list[KernelEvent]]:
    """The events, by start, of each run of a program.

    Without numbered runs (on a GPU) a run begins where the program changes, or where its first kernel comes again.
    """
    if events and events[0].run is not None:
        numbered: dict[tuple[str, int | None], list[KernelEvent]] = defaultdict(list)
        for event in events:
            numbered[event.program, event.run].append(event)
        return list(numbered.values())
    runs: list[list[KernelEvent]] = []
    for event in events:
        first = runs[-1][0] if runs else None
        if first is None or event.program != first.program or _place(event) == _place(first):
            runs.append([])
        runs[-1].append(event)
    return runs


def _place(event: KernelEvent) -> tuple[Any, ...]:
    return event.op, event.name, event.node


def _busy_ns(events: list[KernelEvent]) -> float:
    """Nanoseconds in which at least one of the events, by start, ran."""
    busy, end = 0.0, float("-inf")
    for event in events:
        busy += max(0.0, event.end_ns - max(event.start_ns, end))
        end = max(end, event.end_ns)
    return busy


def kernel_rows(
    events: list[KernelEvent],
    num_steps: int,
    step_seconds: float,
    ceilings: Ceilings,
    instructions: Instructions,
    attention_cost: Cost | None,
    page_bytes: int,
) -> list[dict[str, Any]]:
    """The kernels by time; kernels of one name but for the number at its end, and of one stage, are one row.

    share: of step_seconds. num_bytes, operations (a step) and ceiling_share (the least time that they take over the
    time taken) are None where they are not known: known are matrix products from the program, attention from
    `attention_cost` (a step) where one kernel is handed the pages (page_bytes: of a layer), and what the trace tells.
    """
    events = _with_operations(events, instructions)
    groups = _groups(events, instructions, page_bytes)
    readers = [group for group in groups if group[2]]
    rows = []
    for group, members in groups.items():
        kernel, stage, _ = group
        seconds = sum(event.self_ns for event in members) / 1e9 / num_steps
        # A library may take several kernels for one instruction: they count as one, and so does its cost.
        leading = [event for event in members if _stem(event) == kernel.split(" + ")[0]]
        costs = [_event_cost(event, instructions) for event in leading]
        if [group] == readers and attention_cost is not None:
            costs = [attention_cost] * num_steps
        known = [cost for cost in costs if cost is not None]
        is_known = len(known) == len(costs)
        least = sum(_least(cost, ceilings) for cost in known) / num_steps
        rows.append(
            {
                "kernel": kernel,
                "stage": stage,
                "count_per_step": len(leading) / num_steps,
                "seconds_per_step": seconds,
                "share": seconds / step_seconds,
                "num_bytes": sum(cost.num_bytes for cost in known) / num_steps if is_known else None,
                "operations": sum(cost.operations for cost in known) / num_steps if is_known else None,
                "ceiling_share": least / seconds if is_known and seconds else None,
            }
        )
    return sorted(rows, key=lambda row: -row["seconds_per_step"])


def _with_operations(events: list[KernelEvent], instructions: Instructions) -> list[KernelEvent]:
    """The events, those of CUDA graphs with the instruction that their kernel's name tells, or none."""
    operations = {(module, found.kernel): op for (module, op), found in instructions.items() if found.kernel}
    return [
        event if event.node is None else replace(event, op=operations.get((event.module, event.name), ""))
        for event in events
    ]


def _groups(events: list[KernelEvent], instructions: Instructions, page_bytes: int) -> dict[Group, list[KernelEvent]]:
    """The events of each row; "a + b" where an instruction takes kernel a and then b."""
    names: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for event in events:
        names[event.module, event.op or event.name][_stem(event)] = None
    groups: dict[Group, list[KernelEvent]] = defaultdict(list)
    for event in events:
        instruction = instructions.get((event.module, event.op), Instruction("", None))
        kernel = " + ".join(names[event.module, event.op or event.name])
        # Writing to the pages takes them too.
        reads_pages = ATTENTION_STAGE in instruction.stage.split("/") and page_bytes in instruction.call_bytes
        groups[kernel, instruction.stage, reads_pages].append(event)
    return groups


def _stem(event: KernelEvent) -> str:
    return _NUMBER.sub("", event.name)


def _event_cost(event: KernelEvent, instructions: Instructions) -> Cost | None:
    if event.num_bytes is not None and event.operations is not None:
        return Cost(event.num_bytes, event.operations)
    instruction = instructions.get((event.module, event.op))
    return instruction.cost if instruction else None


def _least(cost: Cost, ceilings: Ceilings) -> float:
    return max(cost.num_bytes / ceilings.bytes_per_second, cost.operations / ceilings.operations_per_second)
