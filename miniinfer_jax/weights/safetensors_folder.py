"""Reads safetensors: one file, or several with an index. Headers first, then tensor by tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from miniinfer_jax.weights.folder import CheckpointError, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of one of its tensors; dtype is safetensors' own name, "BF16"."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Name -> header of every tensor in `folder`; no tensor is read.

    Raises CheckpointError: no weights, pickled weights, a missing or damaged file, an index that its files contradict.
    """
    if (folder / SINGLE_FILE).exists():
        return _file_headers(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).exists():
        return _indexed_headers(folder)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({', '.join(pickled)}), and unpickling can run any code. Convert "
            "them where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) of "
            "transformers writes safetensors"
        )
    raise CheckpointError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_tensor(name: str, header: TensorHeader) -> np.ndarray:
    """The values of one tensor, in memory of its own."""
    with _open(header.file) as file:
        return file.get_tensor(name)


def _open(path: Path) -> Any:
    try:
        # Opened anew for each tensor: pages that were read stay resident while the file is mapped, and with them a
        # second copy of the model.
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated: fetch it again"
        ) from error


def _file_headers(path: Path) -> dict[str, TensorHeader]:
    headers = {}
    with _open(path) as file:
        names = file.keys()  # the file itself cannot be iterated
        for name in names:
            tensor = file.get_slice(name)
            headers[name] = TensorHeader(path, tuple(tensor.get_shape()), tensor.get_dtype())
    return headers


def _indexed_headers(folder: Path) -> dict[str, TensorHeader]:
    index = _read_index(folder / INDEX_FILE)
    files = sorted(set(index.values()))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {INDEX_FILE} names: fetch the missing files")
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in _file_headers(folder / file).items():
            if index.get(name) != file:
                said = f"expects it in {index[name]}" if name in index else "does not name it"
                raise CheckpointError(f"{folder / file} holds {name!r}, but {INDEX_FILE} {said}")
            headers[name] = header
    absent = sorted(set(index) - set(headers))
    if absent:
        raise CheckpointError(f"{INDEX_FILE} of {folder} names tensors that its files do not hold: {', '.join(absent)}")
    return headers


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path} lacks 'weight_map', from tensor name to file name")
    for name, file in index.items():
        # An index is data from outside: it must not lead out of the folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} places {name!r} in {file!r}; it must be the name of a file in the folder")
    return index
