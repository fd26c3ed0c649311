"""How large the page pool is: what the device's memory leaves, or what the requests can use."""

import dataclasses
import logging
import os
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from miniinfer_jax.config import ConfigError, EngineConfig, ModelConfig
from miniinfer_jax.kv_cache import page_bytes
from miniinfer_jax.models.decoder import param_specs
from miniinfer_jax.ops.attention_reference import QUERY_BLOCK
from miniinfer_jax.params import num_bytes

logger = logging.getLogger(__name__)

Device = Any  # a jax.Device, which is a value to type checkers

# A CPU shares its memory with everything else that runs there.
CPU_SHARE = 0.2


def default_device(gpu_memory_utilization: float) -> Device:
    """The device that the engine runs on; JAX takes `gpu_memory_utilization` of a GPU when it first touches it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(gpu_memory_utilization))
    return jax.devices()[0]


def default_page_size(device: Device) -> int:
    """Tokens a page: larger pages read faster on a GPU, smaller ones waste less."""
    return 16 if device.platform == "cpu" else 64


def default_token_budget(device: Device) -> int:
    """Tokens a step: as many as keep a GPU busy, and few enough for a CPU that streams do not stutter."""
    return 512 if device.platform == "cpu" else 8192


def check_dtype(dtype: str, device: Device) -> None:
    """Raises ConfigError for a dtype that the device does not compute in."""
    capability = getattr(device, "compute_capability", None)
    if dtype == "bfloat16" and device.platform == "gpu" and capability and float(capability) < 8.0:
        raise ConfigError(
            f"dtype bfloat16 needs compute capability 8.0, this {device.device_kind} has {capability}: "
            "use dtype='float16' or 'float32'"
        )


def choose_dtype(dtype: str, model: ModelConfig, device: Device) -> str:
    """The dtype to compute in. "auto" is the checkpoint's own, and float32 on a CPU, which is slow in the others."""
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else model.dtype
    check_dtype(dtype, device)
    return dtype


def workspace_bytes(model: ModelConfig, engine: EngineConfig) -> int:
    """An upper estimate of what the largest step needs beside weights and pages."""
    size = jnp.dtype(engine.dtype).itemsize
    tokens = engine.max_num_batched_tokens
    logits = 4 * 4 * engine.max_num_seqs * model.vocab_size
    activations = tokens * (4 * model.hidden_size + 3 * model.ffn_size) * size
    work_items = tokens // QUERY_BLOCK + min(tokens, engine.max_num_seqs)
    num_keys = 256  # of a block, in the backend that holds most at a time
    keys = 2 * work_items * num_keys * model.num_kv_heads * 2 * model.head_dim * size
    scores = 3 * 4 * work_items * QUERY_BLOCK * model.num_heads * num_keys
    rules = 9 * engine.max_num_seqs * model.vocab_size
    return logits + activations + keys + scores + rules


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a device holds, in bytes: weights, a page of the pool, a step's workspace; what is free beside weights."""

    weights: int
    page: int
    workspace: int
    free: int

    def describe(self, num_pages: int) -> str:
        """The sum, for people to read."""
        pool = num_pages * self.page
        return (
            f"weights {_mebibytes(self.weights)} + pool {_mebibytes(pool)} ({num_pages} pages of {self.page} bytes) + "
            f"workspace {_mebibytes(self.workspace)} = {_mebibytes(self.weights + pool + self.workspace)}, and "
            f"{_mebibytes(self.weights + self.free)} are there"
        )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def free_bytes(device: Device, cpu_share: float = CPU_SHARE) -> int:
    """Bytes that pages may take now: what JAX may still take of a GPU, a share of what is free of a CPU's memory."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return int(cpu_share * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room for what it was asked to hold, compile or run."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def fewer_pages(num_pages: int, needed: int) -> int:
    """The size to try after a pool that did not fit: four fifths, and what is needed at least; in the end the same."""
    return min(num_pages, max(num_pages * 4 // 5, needed))


# The least that a limit nobody gave is lowered to, and the share of free memory that a step's workspace may then take.
SMALLEST_LIMITS = {"max_num_batched_tokens": 512, "max_num_seqs": 16}
WORKSPACE_SHARE = 0.5


def _lower_limits(model: ModelConfig, engine: EngineConfig, free: int, names: Collection[str]) -> EngineConfig:
    """The configuration with the limits in `names` halved, the one that saves most first, until a step fits."""
    while workspace_bytes(model, engine) > WORKSPACE_SHARE * free:
        halved = [
            dataclasses.replace(engine, **{name: getattr(engine, name) // 2})
            for name in names
            if getattr(engine, name) // 2 >= SMALLEST_LIMITS[name]
        ]
        if not halved:
            break
        engine = min(halved, key=lambda smaller: workspace_bytes(model, smaller))
    return engine


def size_pool(
    model: ModelConfig,
    engine: EngineConfig,
    device: Device,
    reserved_bytes: int = 0,
    defaults: Collection[str] = (),
) -> EngineConfig:
    """The engine's configuration with max_model_len and num_pages set; the log gets the sum of what the device holds.

    defaults: which of max_num_seqs and max_num_batched_tokens nobody asked for, and may be lowered for a small device.

    The pool takes what memory allows, but no more than max_num_seqs sequences of max_model_len can fill;
    reserved_bytes: what weights that are not loaded yet will take. Raises ConfigError, with the sum, where the pool or
    not even one sequence fits, and for a max_model_len above the model's own.
    """
    max_model_len = engine.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len is {max_model_len}, the model knows positions up to {model.max_position} "
            "(max_position_embeddings in its config.json): lower max_model_len"
        )
    free = free_bytes(device, CPU_SHARE if engine.num_pages is None else 1.0) - reserved_bytes
    engine = _lower_limits(model, engine, free, defaults)
    memory = Memory(
        weights=num_bytes(param_specs(model, engine.dtype)),
        workspace=workspace_bytes(model, engine),
        page=page_bytes(model, engine.page_size, engine.dtype),
        free=free,
    )
    if engine.num_pages is None:
        pages_each = -(-max_model_len // engine.page_size)
        num_pages = min(pages_each * engine.max_num_seqs, (memory.free - memory.workspace) // memory.page)
        needed = pages_each if engine.max_model_len else 1
    else:
        num_pages = needed = engine.num_pages
    if num_pages < needed or num_pages * memory.page + memory.workspace > memory.free:
        raise ConfigError(
            f"no room for the page pool: {memory.describe(needed)}. Raise gpu_memory_utilization, or lower num_pages, "
            "max_model_len, max_num_batched_tokens or max_num_seqs"
        )
    logger.info("device memory: %s", memory.describe(num_pages))
    if engine.max_model_len is None:
        max_model_len = min(max_model_len, num_pages * engine.page_size + 1)
    return dataclasses.replace(engine, max_model_len=max_model_len, num_pages=int(num_pages))
