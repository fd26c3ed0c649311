"""The model families: which architecture of a `config.json` is read by which file of this folder."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from miniinfer_jax.config import ConfigError, ModelConfig

# Architecture -> the file that has its `config_from_hf`, `WEIGHT_MAP` and `UNREAD_WEIGHTS`. A family is imported
# when a checkpoint asks for it, so that a hundred rows cost a start nothing.
FAMILIES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def family(architecture: str) -> ModuleType:
    """The module of an architecture's family; ConfigError, which lists the known, if there is none."""
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"architecture {architecture!r} is not supported; config.json must name one of: {known}")
    return importlib.import_module(f"{__name__}.{FAMILIES[architecture]}")


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the contents `hf` of a Hugging Face `config.json` describe.

    `architectures` decides on the family, else `model_type`. Raises ConfigError, by name, for an unknown
    architecture, a missing key, and a value that changes results and is not supported.
    """
    return family(architecture_of(hf)).config_from_hf(hf)


def architecture_of(hf: Mapping[str, Any]) -> str:
    """The architecture that a `config.json` names."""
    architectures = hf.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    model_type = hf.get("model_type")
    by_module = {module: architecture for architecture, module in reversed(FAMILIES.items())}
    if model_type is None:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"config.json lacks 'architectures' and 'model_type'; known architectures: {known}")
    return by_module.get(model_type, str(model_type))
