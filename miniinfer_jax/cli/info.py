"""`miniinfer info`: what is installed, what the device is, and what a model takes there. Loads no weights."""

import importlib.metadata
import json
import platform
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer

from miniinfer_jax.cli.options import EngineOptions, flatten_options
from miniinfer_jax.config import EngineConfig

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "safetensors", "numpy")


@flatten_options
def info(
    engine: EngineOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Versions, devices, and the sizes that a model and its cache have with these options."""
    import miniinfer_jax

    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    document = {
        "miniinfer": miniinfer_jax.__version__,
        "python": platform.python_version(),
        **versions,
        "devices": _describe_devices(),
        "model": _describe_model(engine),
    }
    if as_json:
        print(json.dumps(document))
    else:
        _print_tree(document)


def _describe_devices() -> list[dict[str, Any]]:
    import jax

    devices = []
    for device in jax.local_devices():
        memory = device.memory_stats() or {}
        devices.append(
            {
                "id": device.id,
                "kind": device.device_kind,
                "platform": device.platform,
                "memory_bytes": memory.get("bytes_limit"),
                "memory_in_use_bytes": memory.get("bytes_in_use"),
            }
        )
    return devices


def _describe_model(options: EngineOptions) -> dict[str, Any]:
    from miniinfer_jax import kv_cache, params
    from miniinfer_jax.benchmark.roofline import num_params
    from miniinfer_jax.engine.buckets import choose_buckets
    from miniinfer_jax.engine.memory import (
        choose_dtype,
        default_device,
        default_page_size,
        default_token_budget,
        size_pool,
    )
    from miniinfer_jax.models.decoder import param_specs
    from miniinfer_jax.weights.folder import read_model_config, resolve

    config = read_model_config(resolve(options.model, options.revision))
    device = default_device(options.gpu_memory_utilization)
    dtype = choose_dtype(options.dtype, config, device)
    page_size = options.page_size or default_page_size(device)
    weight_bytes = params.num_bytes(param_specs(config, dtype))
    engine = size_pool(
        config,
        _engine_config(options, dtype, page_size, default_token_budget(device)),
        device,
        reserved_bytes=weight_bytes,
        defaults=[name for name in ("max_num_seqs", "max_num_batched_tokens") if getattr(options, name) is None],
    )
    buckets = choose_buckets(engine)
    page_bytes = kv_cache.page_bytes(config, page_size, dtype)
    return {
        "name": options.model,
        "config": asdict(config),
        "num_params": num_params(config),
        "weight_bytes": weight_bytes,
        "dtype": dtype,
        "max_model_len": engine.max_model_len,
        "page_size": page_size,
        "page_bytes": page_bytes,
        "num_pages": engine.num_pages,
        "cache_bytes": page_bytes * (engine.num_pages or 0),
        "ragged_bucket_tokens": sorted({bucket.num_tokens for bucket in buckets.ragged}),
        "decode_bucket_rows": [bucket.num_rows for bucket in buckets.decode],
    }


def _engine_config(options: EngineOptions, dtype: str, page_size: int, token_budget: int) -> EngineConfig:
    given = {name: value for name, value in asdict(options).items() if value is not None}
    known = {field.name for field in fields(EngineConfig)}
    values = {name: value for name, value in given.items() if name in known}
    return EngineConfig(**{"max_num_batched_tokens": token_budget, **values, "dtype": dtype, "page_size": page_size})


def _print_tree(value: Any, indent: str = "") -> None:
    """One line a value, nested ones indented below their name."""
    for name, entry in value.items():
        if isinstance(entry, dict):
            print(f"{indent}{name}:")
            _print_tree(entry, indent + "  ")
        elif isinstance(entry, list | tuple) and entry and isinstance(entry[0], dict):
            _print_tree({f"{name}[{index}]": item for index, item in enumerate(entry)}, indent)
        elif isinstance(entry, list | tuple):
            print(f"{indent}{name}: {', '.join(map(str, entry))}")
        else:
            print(f"{indent}{name}: {entry}")
