"""Which weight of a checkpoint belongs at which place of the parameter tree, and in which shape it lies in the file."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from miniinfer_jax.params import ParamSpec, Tree, is_spec

_ROW = re.compile(r"(?P<path>.+)\[(?P<row>\d+)\]")


@dataclass(frozen=True)
class Place:
    """A leaf of the parameter tree by its path ("layers.0.gate_up"), and the row of it that is meant; None: all."""

    path: str
    row: int | None


def expand_name(name: str, num_layers: int) -> list[str]:
    """The name itself, or one name a layer where it has a `{layer}`."""
    return [name.replace("{layer}", str(layer)) for layer in range(num_layers)] if "{layer}" in name else [name]


def expand_map(weight_map: Mapping[str, str], num_layers: int) -> dict[str, Place]:
    """Name in the checkpoint -> place, for every layer."""
    places = {}
    for name, target in weight_map.items():
        match = _ROW.fullmatch(target)
        path, row = (match["path"], int(match["row"])) if match else (target, None)
        for one_name, one_path in zip(expand_name(name, num_layers), expand_name(path, num_layers), strict=True):
            places[one_name] = Place(one_path, row)
    return places


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Path -> leaf, in the order of the tree; a weight that the model lacks (None) is no leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def file_shape(name: str, place: Place, spec: ParamSpec) -> tuple[int, ...]:
    """The shape of a weight in its file: a bias or norm is flat, anything else is [outputs, inputs]."""
    shape = spec.shape if place.row is None else spec.shape[1:]
    if name.endswith(".bias") or len(shape) == 1:
        return (math.prod(shape),)
    split = len(shape) - spec.num_input_axes
    return (math.prod(shape[:split]), math.prod(shape[split:]))
