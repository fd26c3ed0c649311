"""From the events of a trace to a table: hand-written events as a GPU and a CPU record them."""

from types import SimpleNamespace

import pytest

from miniinfer_jax.benchmark.hlo_text import Cost, Instruction
from miniinfer_jax.benchmark.kernel_table import device_times, kernel_rows, split_runs
from miniinfer_jax.benchmark.kernel_trace import KernelEvent, kernels_of_line
from miniinfer_jax.benchmark.roofline import Ceilings

CEILINGS = Ceilings(bytes_per_second=1e12, operations_per_second=1e14)
STEP = "jit_decode_step"
PAGE_BYTES = 99_000


def raw(name: str, start: int, end: int, **stats):
    return SimpleNamespace(name=name, start_ns=start, end_ns=end, stats=list(stats.items()))


def gpu_step(start: int) -> list[SimpleNamespace]:
    """Nanoseconds: a product in two kernels, attention, 10 of nothing, a fusion; 90 busy of 100."""
    kernels = [
        ("nvjet_hsh_64x8", 0, 30, "custom-call.1"),
        ("splitKreduce_kernel", 30, 40, "custom-call.1"),
        ("paged_decode", 40, 80, "custom-call.2"),
        ("loop_add_fusion_7", 90, 100, "loop_add_fusion.7"),
    ]
    return [
        raw(name, start + begin, start + end, hlo_module=STEP, hlo_op=op, program_id=5, kernel_details="regs:8")
        for name, begin, end, op in kernels
    ]


INSTRUCTIONS = {
    (STEP, "custom-call.1"): Instruction("qkv", Cost(num_bytes=20_000, operations=1_000_000), (512, 99_000)),
    (STEP, "custom-call.2"): Instruction("attention", None, (512, PAGE_BYTES)),
    (STEP, "loop_add_fusion.7"): Instruction("", None),
}


@pytest.fixture
def gpu_events() -> list[KernelEvent]:
    """Three steps with 25 ns between them, and a copy of tokens to the host in one of the gaps."""
    copy = raw("MemcpyD2H", 105, 110, memcpy_details="size:4")
    events = kernels_of_line([*gpu_step(0), copy, *gpu_step(125), *gpu_step(250)], is_gpu=True)
    assert [event.self_ns for event in events[:4]] == [30, 10, 40, 10]
    return events


def test_idle_time_of_a_gpu(gpu_events):
    times = device_times(gpu_events, num_steps=3)
    assert times["device_seconds_per_step"] == pytest.approx(125e-9)
    assert times["busy_seconds_per_step"] == pytest.approx(90e-9)
    assert times["idle_share"] == pytest.approx(25 / 125)
    assert times["idle_share_within_steps"] == pytest.approx(10 / 125)


def test_idle_time_is_unknown_where_steps_cannot_be_told_apart(gpu_events):
    times = device_times(gpu_events, num_steps=4)
    assert times["idle_share"] is times["device_seconds_per_step"] is None
    assert times["busy_seconds_per_step"] == pytest.approx(90e-9 * 3 / 4)
    assert device_times(gpu_events[:4], num_steps=1)["idle_share"] is None  # one step has no gap


def test_kernels_by_time(gpu_events):
    attention = Cost(num_bytes=30_000, operations=500_000)
    rows = kernel_rows(gpu_events, 3, 125e-9, CEILINGS, INSTRUCTIONS, attention, PAGE_BYTES)
    assert [row["kernel"] for row in rows] == [
        "nvjet_hsh_64x8 + splitKreduce_kernel",
        "paged_decode",
        "loop_add_fusion",
        "MemcpyD2H",
    ]
    product, attended, fusion, copy = rows
    assert (product["stage"], product["count_per_step"]) == ("qkv", 1)
    assert product["seconds_per_step"] == pytest.approx(40e-9) and product["share"] == pytest.approx(40 / 125)
    assert (product["num_bytes"], product["operations"]) == (20_000, 1_000_000)
    assert product["ceiling_share"] == pytest.approx(20 / 40)  # 20 ns for the bytes, 10 ns for the operations
    assert attended["num_bytes"] == 30_000 and attended["ceiling_share"] == pytest.approx(30 / 40)
    assert fusion["ceiling_share"] is fusion["num_bytes"] is copy["ceiling_share"] is None
    assert copy["count_per_step"] == pytest.approx(1 / 3)


def test_kernels_of_a_graph_are_told_by_their_names():
    """In a CUDA graph every kernel's operation is the graph; the same kernel may stand in it twice."""
    names = ["loop_add_fusion_7", "attend_split_mosaic_gpu_kernel", "loop_add_fusion_7", "nvjet_hsh_64x8"]
    stats = {"hlo_op": "command_buffer", "hlo_module": STEP, "program_id": 5}
    steps = [
        raw(name, 100 * step + 20 * node, 100 * step + 20 * node + 10, cuda_graph_node_id=node, **stats)
        for step in range(2)
        for node, name in enumerate(names)
    ]
    instructions = {
        (STEP, "custom-call.2"): Instruction("attention", None, (PAGE_BYTES,), "attend_split_mosaic_gpu_kernel"),
        (STEP, "loop_add_fusion.7"): Instruction("rope", Cost(5_000, 10), (), "loop_add_fusion_7"),
    }
    events = kernels_of_line(steps, is_gpu=True)
    assert device_times(events, num_steps=2)["device_seconds_per_step"] == pytest.approx(100e-9)
    rows = kernel_rows(events, 2, 100e-9, CEILINGS, instructions, Cost(8_000, 0), PAGE_BYTES)
    found = {row["kernel"]: (row["stage"], row["count_per_step"], row["ceiling_share"]) for row in rows}
    assert found == {
        "loop_add_fusion": ("rope", 2, pytest.approx(5 / 10)),
        "attend_split_mosaic_gpu_kernel": ("attention", 1, pytest.approx(8 / 10)),
        "nvjet_hsh_64x8": ("", 1, None),
    }


@pytest.mark.parametrize(("last", "known"), [((512,), [30 / 40, None]), ((512, PAGE_BYTES), [None, None])])
def test_attention_is_the_one_kernel_that_is_handed_the_pages(gpu_events, last, known):
    """The kernel that combines parts is not it; and of two that are, neither is guessed to be."""
    two = {**INSTRUCTIONS, (STEP, "loop_add_fusion.7"): Instruction("attention", None, last)}
    rows = kernel_rows(gpu_events, 3, 125e-9, CEILINGS, two, Cost(30_000, 500_000), PAGE_BYTES)
    shares = [row["ceiling_share"] for row in rows if row["stage"] == "attention"]
    assert shares == [share and pytest.approx(share) for share in known]


def test_costs_that_the_trace_tells():
    events = kernels_of_line([raw("a", 0, 50, hlo_op="a", bytes_accessed=40_000, flops=100)], is_gpu=True)
    (row,) = kernel_rows(events, 1, 50e-9, CEILINGS, {}, None, PAGE_BYTES)
    assert row["ceiling_share"] == pytest.approx(40 / 50)


def test_programs_that_change_are_runs_of_their_own():
    events = [KernelEvent("k", t, t + 1, 1, "k", module, module) for t, module in enumerate("abba")]
    assert [len(run) for run in split_runs(events)] == [1, 1, 1, 1]
    events = [KernelEvent(name, t, t + 1, 1, name, "a", "a") for t, name in enumerate("xyyxyy")]
    assert [len(run) for run in split_runs(events)] == [3, 3]


def test_a_thread_of_a_cpu():
    line = [
        raw("ThunkExecutor::Execute", 0, 100),
        raw("while.1", 0, 50, hlo_op="while.1", hlo_module=STEP, program_id=1, run_id=7),
        raw("add.1", 10, 20, hlo_op="add.1", hlo_module=STEP, program_id=1, run_id=7),
        raw("add.1", 20, 35, hlo_op="add.1", hlo_module=STEP, program_id=1, run_id=7),
        raw("end: add.1", 35, 36, hlo_op="add.1", hlo_module=STEP, program_id=1, run_id=7),
        raw("add.1", 60, 70, hlo_op="add.1", hlo_module=STEP, program_id=1, run_id=8),
    ]
    kernels = kernels_of_line(line, is_gpu=False)
    assert [(kernel.name, kernel.self_ns) for kernel in kernels] == [
        ("while.1", 25),
        ("add.1", 10),
        ("add.1", 15),
        ("add.1", 10),
    ]
    times = device_times(kernels, num_steps=2)
    assert times["idle_share"] == pytest.approx(10 / 40)  # steps of 50 and 10, a gap of 10
    assert times["busy_seconds_per_step"] == pytest.approx(30e-9)
