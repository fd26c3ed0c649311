"""How the pool is sized, on a device that is made up: the sum is shown, and limits that nobody gave give way."""

import logging
from dataclasses import dataclass

import pytest

from miniinfer_jax.config import EngineConfig
from miniinfer_jax.engine.memory import CPU_SHARE, fewer_pages, free_bytes, size_pool, workspace_bytes
from miniinfer_jax.kv_cache import page_bytes
from miniinfer_jax.models.decoder import param_specs
from miniinfer_jax.params import num_bytes
from miniinfer_jax.weights import read_model_config
from tests.tiny import make_checkpoint


@dataclass(frozen=True)
class SmallGpu:
    """A GPU of which JAX may take `limit` bytes and has taken `in_use`."""

    limit: int
    in_use: int = 0
    platform: str = "gpu"

    def memory_stats(self):
        return {"bytes_limit": self.limit, "bytes_in_use": self.in_use}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read_model_config(make_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


def engine(**values):
    return EngineConfig(**{"dtype": "float32", "max_num_seqs": 256, "max_num_batched_tokens": 8192} | values)


def test_the_pool_takes_what_is_left(model):
    config = engine(max_num_batched_tokens=64, max_num_seqs=32, max_model_len=512)
    page, workspace = page_bytes(model, 16, "float32"), workspace_bytes(model, config)
    sized = size_pool(model, config, SmallGpu(limit=1000 + workspace + 100 * page + page // 2, in_use=1000))
    assert (sized.num_pages, sized.max_model_len) == (100, 512)
    roomy = size_pool(model, config, SmallGpu(limit=2**40))
    assert roomy.num_pages == 32 * 512 // 16  # never more than all sequences together could fill


def test_the_sum_is_shown(model, caplog):
    config = engine(max_num_batched_tokens=64, max_num_seqs=4, num_pages=50)
    with caplog.at_level(logging.INFO):
        size_pool(model, config, SmallGpu(limit=2**30))
    weights = num_bytes(param_specs(model, "float32")) / 2**20
    pool, workspace = 50 * page_bytes(model, 16, "float32") / 2**20, workspace_bytes(model, config) / 2**20
    total = weights + pool + workspace
    expected = (
        f"weights {weights:,.1f} MiB + pool {pool:,.1f} MiB (50 pages of {page_bytes(model, 16, 'float32')} bytes)"
    )
    assert f"{expected} + workspace {workspace:,.1f} MiB = {total:,.1f} MiB" in caplog.text


@pytest.mark.parametrize("values", [{"num_pages": 1000}, {"max_model_len": 512}, {}])
def test_a_pool_that_does_not_fit_is_refused_with_the_sum(model, values):
    config = engine(max_num_batched_tokens=64, max_num_seqs=4, **values)
    device = SmallGpu(limit=workspace_bytes(model, config) + page_bytes(model, 16, "float32") - 1)
    with pytest.raises(ValueError, match=r"weights .* MiB \+ pool .* MiB .* \+ workspace .* MiB = .* MiB are there"):
        size_pool(model, config, device)


def test_limits_that_nobody_gave_are_lowered_for_a_small_device(model):
    config = engine()
    free = workspace_bytes(model, config)
    both = ("max_num_seqs", "max_num_batched_tokens")
    lowered = size_pool(model, config, SmallGpu(limit=free), defaults=both)
    assert workspace_bytes(model, lowered) <= free / 2
    assert lowered.max_num_seqs >= 16 and lowered.max_num_batched_tokens >= 512
    assert lowered.max_num_batched_tokens < 8192 or lowered.max_num_seqs < 256
    kept = size_pool(model, config, SmallGpu(limit=64 * free), defaults=both)
    assert (kept.max_num_seqs, kept.max_num_batched_tokens) == (256, 8192)
    given = size_pool(model, config, SmallGpu(limit=int(1.5 * free)))
    assert (given.max_num_seqs, given.max_num_batched_tokens) == (256, 8192)


def test_a_cpu_shares_its_memory():
    class Cpu:
        platform = "cpu"

    assert free_bytes(Cpu()) == pytest.approx(CPU_SHARE * free_bytes(Cpu(), 1.0), rel=0.2)


def test_fewer_pages_come_to_an_end():
    sizes = [100]
    while (fewer := fewer_pages(sizes[-1], needed=30)) != sizes[-1]:
        sizes.append(fewer)
    assert sizes == [100, 80, 64, 51, 40, 32, 30]
    assert fewer_pages(5, needed=16) == 5
