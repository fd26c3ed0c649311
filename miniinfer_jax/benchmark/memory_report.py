"""What of the device's memory is weights, pages and workspace."""

from typing import Any

import jax


def peak_bytes() -> int | None:
    """The most that JAX has held of the first device's memory in this process; None where it does not say (a CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def memory_report(llm: Any, peak_before: int | None) -> dict[str, int | None]:
    """Bytes of the weights, pages and slot state of an engine, the peak, and what of the peak is none of them.

    peak_before: `peak_bytes` before the engine was opened. Where the peak is still that one, it is not the engine's,
    and the workspace is None. The workspace includes what starting took beside weights and pages.
    """
    peak = peak_bytes()
    held = llm.engine.device_arrays_bytes()
    is_own = peak is not None and peak > (peak_before or 0)
    return {
        "peak_bytes": peak,
        "weight_bytes": held["weights"],
        "page_bytes": held["pages"],
        "state_bytes": held["state"],
        "workspace_bytes": peak - sum(held.values()) if peak is not None and is_own else None,
    }
