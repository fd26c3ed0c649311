"""Where a checkpoint lies (a folder, a hub id, a model that ships) and the JSON files in it. Nothing in it is run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from miniinfer_jax import models
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.models.huggingface import token_ids

_DEMO = Path(__file__).parents[1] / "demo"
SHIPPED_MODELS = {"demo": _DEMO, "demo-draft": _DEMO / "draft"}

# What is downloaded of a hub repository: data only, from its top folder only.
HUB_FILES = ["*.json", "model*.safetensors", "*.txt", "*.jinja"]


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged or of another model; says which file or weight, and what was expected."""


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder of `model`: "demo" or "demo-draft" (shipped), a folder, or a hub id, downloaded where not yet cached.

    revision: branch, tag or commit of a hub id. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold as for huggingface_hub.
    Raises CheckpointError, which says what was tried.
    """
    name, folder = str(model), Path(model).expanduser()
    is_shipped = name in SHIPPED_MODELS
    if is_shipped or (name and folder.is_dir()):
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} is given, but {name!r} is no hub id: leave revision out")
        return SHIPPED_MODELS[name] if is_shipped else folder
    if folder.is_file():
        raise CheckpointError(f"model {name!r} is a file; give the folder that holds it and its config.json")
    is_path = folder.is_absolute() or name.startswith(".") or name.count("/") > 1
    if not name or is_path:
        raise CheckpointError(f"model folder {name!r} does not exist")
    return _download(name, revision)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # takes 0.3 s, which a local folder need not pay

    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:  # what huggingface_hub raises: no such id, no access, no network, no space
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at_revision = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"model {repository!r} is not a folder here (looked for {Path(repository).absolute()}), and as a hub id"
            f"{at_revision} it could not be fetched: {reason}. Give a folder, a hub id, or one of: "
            f"{', '.join(SHIPPED_MODELS)}"
        ) from error
    return Path(found)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError, with the path, if it is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a model folder needs it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`, as data."""
    return read_json(folder / "config.json")


def read_model_config(folder: Path) -> ModelConfig:
    """The configuration of the checkpoint in `folder`; end-of-sequence ids of `generation_config.json` are added.

    Raises CheckpointError for a missing or damaged file, ConfigError for what config.json says.
    """
    config = models.config_from_hf(read_config(folder))
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    # Chat models often name only one of the tokens that end a turn in config.json, and all of them here.
    more = token_ids(read_json(generation), "eos_token_id", config.vocab_size)
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))
