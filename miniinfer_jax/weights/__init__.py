"""Checkpoints: from a folder or a hub id to the parameters of a model, and back to a folder."""

from miniinfer_jax.weights.folder import CheckpointError, read_config, read_model_config, resolve
from miniinfer_jax.weights.load import LOAD_FORMATS, load_params
from miniinfer_jax.weights.save import save_params

__all__ = [
    "LOAD_FORMATS",
    "CheckpointError",
    "load_params",
    "read_config",
    "read_model_config",
    "resolve",
    "save_params",
]
