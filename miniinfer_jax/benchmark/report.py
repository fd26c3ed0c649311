"""What every benchmark reports in the same words: the bound of a cost, and on what it was measured."""

import datetime
import platform
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp

import miniinfer_jax
from miniinfer_jax.benchmark.roofline import Ceilings, StepCost, least_seconds, num_params


def bound(cost: StepCost, ceilings: Ceilings) -> dict[str, Any]:
    """A cost as figures: bytes, operations and the least seconds they take."""
    return {**asdict(cost), "num_bytes": cost.num_bytes, "least_seconds": least_seconds(cost, ceilings)}


def reached(cost: StepCost, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """A cost as figures, and how near `seconds` came to the device's ceilings.

    share: the least seconds over the measured ones; read_share and matmul_share: of each ceiling by itself.
    """
    figures = bound(cost, ceilings)
    bytes_per_second, operations_per_second = cost.num_bytes / seconds, cost.operations / seconds
    return {
        **figures,
        "share": figures["least_seconds"] / seconds,
        "bytes_per_second": bytes_per_second,
        "read_share": bytes_per_second / ceilings.bytes_per_second,
        "operations_per_second": operations_per_second,
        "matmul_share": operations_per_second / ceilings.operations_per_second,
    }


def itemsize_of(llm: Any) -> int:
    """Bytes of one weight, and of one number in the KV cache."""
    return jnp.dtype(llm.engine.engine_config.dtype).itemsize


def describe_run(llm: Any, model: str, ceilings: Ceilings, startup_seconds: float) -> dict[str, Any]:
    """Date, device, versions, model and measured ceilings: what a figure means nothing without."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "miniinfer": miniinfer_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "model": model,
        "dtype": llm.engine.engine_config.dtype,
        "num_params": num_params(llm.model_config),
        "startup_seconds": startup_seconds,
        "ceilings": asdict(ceilings),
    }
