"""Writes a model as a checkpoint in Hugging Face's layout, which this engine, transformers and others read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from miniinfer_jax import models
from miniinfer_jax.params import Tree
from miniinfer_jax.weights.folder import CheckpointError
from miniinfer_jax.weights.places import expand_map, file_shape, leaves_by_path
from miniinfer_jax.weights.safetensors_folder import SINGLE_FILE


def save_params(folder: Path, params: Tree, specs: Tree, hf_config: Mapping[str, Any]) -> None:
    """Writes `params`, declared by `specs`, to `model.safetensors` and `hf_config` to `config.json`.

    Every weight is written in the dtype that hf_config names. Raises ConfigError for an hf_config that could not be
    loaded again, CheckpointError for params that are not of the model that it describes.
    """
    config = models.config_from_hf(hf_config)
    dtype = jnp.dtype(config.dtype)
    places = expand_map(models.family(config.architecture).WEIGHT_MAP, config.num_layers)
    leaves, declared = leaves_by_path(params), leaves_by_path(specs)
    _check_same_model(leaves, declared, {place.path for place in places.values()})
    tensors = {}
    for name, place in places.items():
        if place.path in leaves:
            values = np.asarray(leaves[place.path])[place.part]
            shape = file_shape(name, place, declared[place.path])
            tensors[name] = np.ascontiguousarray(values.reshape(shape).astype(dtype))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})  # transformers asks for this entry
    (folder / "config.json").write_text(json.dumps(dict(hf_config), indent=2) + "\n", encoding="utf-8")


def _check_same_model(leaves: dict[str, Any], declared: dict[str, Any], named: set[str]) -> None:
    problems = [path for path in leaves if path not in declared or path not in named]
    problems += [path for path, spec in declared.items() if path not in leaves or leaves[path].shape != spec.shape]
    if problems:
        raise CheckpointError(f"params, specs and hf_config are not of one model; they differ in {', '.join(problems)}")
