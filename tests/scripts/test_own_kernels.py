"""The kernels of the examples against their definitions: interpreted on the CPU where it can be, compiled on a GPU."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


def interpreter():
    """Mosaic's CPU interpreter, which moved between jax 0.10 and 0.11."""
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    return {"interpret": InterpretGPUParams()}


@pytest.mark.parametrize(
    ("example", "options"),
    [
        pytest.param("own_kernel_pallas", interpreter, id="pallas-interpreted"),
        pytest.param("own_kernel_pallas", dict, id="pallas-gpu", marks=pytest.mark.gpu),
        pytest.param("own_kernel_triton", dict, id="triton-gpu", marks=pytest.mark.gpu),
    ],
)
def test_the_kernel_is_its_definition(example, options):
    module = runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name=example)
    logits = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32) * 40
    capped = jax.jit(lambda logits: module["soft_cap_kernel"](logits, **options()))(logits)
    np.testing.assert_allclose(capped, module["soft_cap_reference"](logits), rtol=2e-3, atol=1e-4)
    assert np.abs(capped).max() > 25 and np.abs(logits).max() > 60  # something was capped
