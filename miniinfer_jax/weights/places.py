"""Which weight of a checkpoint belongs at which place of the parameter tree, and in which shape it lies in the file."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from miniinfer_jax.params import ParamSpec, Tree, is_spec

_PART = re.compile(r"(?P<path>[^\[]+)\[(?P<part>[^\]]+)\]")

Index = int | slice


@dataclass(frozen=True)
class Place:
    """A leaf of the parameter tree by its path ("layers.0.gate_up"), and the part of it that is meant; (): all."""

    path: str
    part: tuple[Index, ...] = ()


def expand_name(name: str, num_layers: int) -> list[str]:
    """The name itself, or one name a layer where it has a `{layer}`."""
    return [name.replace("{layer}", str(layer)) for layer in range(num_layers)] if "{layer}" in name else [name]


def expand_map(weight_map: Mapping[str, str], num_layers: int) -> dict[str, Place]:
    """Name in the checkpoint -> place, for every layer. A target is a path, or a path and a part: "path[:, -1]"."""
    places = {}
    for name, target in weight_map.items():
        match = _PART.fullmatch(target)
        path, part = (match["path"], _parse_part(match["part"])) if match else (target, ())
        for one_name, one_path in zip(expand_name(name, num_layers), expand_name(path, num_layers), strict=True):
            places[one_name] = Place(one_path, part)
    return places


def _parse_part(text: str) -> tuple[Index, ...]:
    """The index that ":, :-2" or "1" stands for, as numpy reads it."""

    def parse(axis: str) -> Index:
        bounds = [int(bound) if bound.strip() else None for bound in axis.split(":")]
        return slice(*bounds) if ":" in axis else int(axis)

    return tuple(parse(axis) for axis in text.split(","))


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Path -> leaf, in the order of the tree; a weight that the model lacks (None) is no leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def file_shape(name: str, place: Place, spec: ParamSpec) -> tuple[int, ...]:
    """The shape of a weight in its file: a bias or norm is flat, anything else is [outputs, inputs]."""
    shape = np.broadcast_to(0, spec.shape)[place.part].shape
    if name.endswith(".bias") or len(shape) == 1:
        return (math.prod(shape),)
    split = len(shape) - spec.num_input_axes
    return (math.prod(shape[:split]), math.prod(shape[split:]))
