"""Tests run on the CPU with 8 virtual devices, unless `-m gpu` asks for the GPU; programs compiled once are shared."""

import os
from pathlib import Path

import pytest


def pytest_configure(config):
    """Before jax is imported anywhere."""
    wants_gpu = (config.getoption("markexpr") or "").strip() == "gpu"
    if not wants_gpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_force_host_platform_device_count" not in flags:
            # Level 0 compiles in half the time. What must hold bitwise is tested in a process without it.
            ours = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
            os.environ["XLA_FLAGS"] = f"{flags} {ours}".strip()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """One compile cache a test run, shared by its workers and by the processes that tests start."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    os.environ["MINIINFER_CACHE_ROOT"] = str(Path(shared) / "compile-cache")
