"""Loads the parameters of a model: names and shapes are checked against the files' headers before a weight is read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from miniinfer_jax import models
from miniinfer_jax.config import ConfigError, ModelConfig
from miniinfer_jax.params import ParamSpec, Tree, is_spec, random_init
from miniinfer_jax.weights.folder import CheckpointError
from miniinfer_jax.weights.places import Place, expand_map, expand_name, file_shape, leaves_by_path
from miniinfer_jax.weights.safetensors_folder import TensorHeader, read_headers, read_tensor

LOAD_FORMATS = ("auto", "safetensors", "dummy")
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # by safetensors' names
CPU_ALIGNMENT = 64  # bytes, from which XLA's CPU client takes an array over without a copy
MAX_PROBLEMS = 50


def load_params(folder: Path, config: ModelConfig, specs: Tree, load_format: str = "auto", seed: int = 0) -> Tree:
    """The tree of `specs` filled from the checkpoint in `folder`, each weight in its spec's dtype, on one device.

    load_format: "auto" and "safetensors" read files; "dummy" draws random weights by `seed` and reads nothing. Host
    memory stays within the weights kept, the largest one and what is built from it. Raises CheckpointError, with every
    weight that is missing, left over, of the wrong shape or not floating, before anything is read.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format {load_format!r} is not known; use one of {', '.join(LOAD_FORMATS)}")
    if load_format == "dummy":
        return random_init(specs, jax.random.key(seed))
    headers = read_headers(folder)
    sources = match(folder, config, specs, headers)
    arrays = []
    for path, spec in leaves_by_path(specs).items():
        arrays.append(_load_one(spec, sources[path], headers))
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), arrays)


Sources = dict[str, dict[str, Place]]  # path in the tree -> the weights of the file that fill it, by name


def match(folder: Path, config: ModelConfig, specs: Tree, headers: dict[str, TensorHeader]) -> Sources:
    """What fills each parameter; CheckpointError with every problem that names, shapes and dtypes have."""
    family = models.family(config.architecture)
    places = expand_map(family.WEIGHT_MAP, config.num_layers)
    unread = {name for row in family.UNREAD_WEIGHTS for name in expand_name(row, config.num_layers)}
    leaves = leaves_by_path(specs)
    sources: Sources = {path: {} for path in leaves}
    problems = []
    for name, place in places.items():
        if place.path not in leaves:
            continue
        sources[place.path][name] = place
        if name not in headers:
            problems.append(f"missing: {name}")
        else:
            problems += _tensor_problems(name, place, leaves[place.path], headers[name])
    wanted = {name for names in sources.values() for name in names}
    problems += [f"left over: {name}" for name in headers if name not in wanted and name not in unread]
    if problems:
        shown = problems[:MAX_PROBLEMS]
        more = f"\n  ... and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise CheckpointError(
            f"the weights in {folder} are not those of its config.json ({config.architecture}):\n  "
            + "\n  ".join(shown)
            + more
        )
    unfilled = [path for path, names in sources.items() if not names]
    assert not unfilled, f"WEIGHT_MAP of {config.architecture} has no row for {unfilled}"
    return sources


def _tensor_problems(name: str, place: Place, spec: ParamSpec, header: TensorHeader) -> list[str]:
    problems = []
    expected = file_shape(name, place, spec)
    if header.shape != expected:
        problems.append(f"wrong shape: {name} is {list(header.shape)}, expected {list(expected)}")
    if header.dtype not in FLOAT_DTYPES:
        problems.append(f"wrong dtype: {name} is {header.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    return problems


def _load_one(spec: ParamSpec, names: dict[str, Place], headers: dict[str, TensorHeader]) -> jax.Array:
    buffer = _aligned_buffer(spec.shape, jnp.dtype(spec.dtype))
    for name, place in names.items():
        target = buffer[place.part]
        target[...] = read_tensor(name, headers[name]).reshape(target.shape)
    # Waiting lets go of the buffer before the next weight is read: else transfers queue up with theirs.
    return jax.block_until_ready(jax.device_put(buffer))


def _aligned_buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array that a CPU device takes over as it is, so that no weight is ever there twice."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(num_bytes + CPU_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % CPU_ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)
