"""What the memory of a device went to, with the device's own figures in its place."""

from types import SimpleNamespace

import pytest

from miniinfer_jax.benchmark import memory_report

HELD = {"weights": 100, "pages": 50, "state": 5}
LLM = SimpleNamespace(engine=SimpleNamespace(device_arrays_bytes=lambda: HELD))


@pytest.mark.parametrize(
    ("peak", "peak_before", "workspace"),
    [
        (175, 40, 20),
        (175, None, 20),
        (175, 175, None),  # measuring the ceilings took more than the engine
        (None, None, None),  # a CPU
    ],
)
def test_what_is_no_weight_page_or_state_is_workspace(monkeypatch, peak, peak_before, workspace):
    stats = None if peak is None else {"peak_bytes_in_use": peak}
    device = SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(memory_report.jax, "devices", lambda: [device])
    assert memory_report.memory_report(LLM, peak_before) == {
        "peak_bytes": peak,
        "weight_bytes": 100,
        "page_bytes": 50,
        "state_bytes": 5,
        "workspace_bytes": workspace,
    }
