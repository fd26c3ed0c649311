"""`ParamSpec` declares a weight once: shape, axis names, dtype, how it starts. All else derives from a tree of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any  # a pytree whose leaves are of one kind: ParamSpec, jax.Array, ...


@dataclass(frozen=True)
class ParamSpec:
    """A weight to be: its shape, the logical name of each axis, its dtype and its initial distribution.

    init: "normal" (standard deviation 1/sqrt(fan_in), the product of the last `num_input_axes` axes), "zeros", "ones".
    Weights are stored output axes first, input axes last, as Hugging Face's files hold them.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    init: str = "normal"
    num_input_axes: int = 1

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def is_spec(value: Any) -> bool:
    return isinstance(value, ParamSpec)


def map_specs(function: Callable[[ParamSpec], Any], specs: Tree) -> Tree:
    """The tree of `function(spec)`."""
    return jax.tree.map(function, specs, is_leaf=is_spec)


def abstract_arrays(specs: Tree) -> Tree:
    """The tree of `jax.ShapeDtypeStruct`: for lowering and for sizes, without memory."""
    return map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)


def num_bytes(specs: Tree) -> int:
    """Bytes that the weights of `specs` take."""
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    return sum(math.prod(spec.shape) * jnp.dtype(spec.dtype).itemsize for spec in leaves)


def _init_one(spec: ParamSpec, key: jax.Array) -> jax.Array:
    if spec.init == "zeros":
        return jnp.zeros(spec.shape, spec.dtype)
    if spec.init == "ones":
        return jnp.ones(spec.shape, spec.dtype)
    fan_in = math.prod(spec.shape[len(spec.shape) - spec.num_input_axes :])
    return (jax.random.normal(key, spec.shape, jnp.float32) * fan_in**-0.5).astype(spec.dtype)


# One compiled initializer a distinct spec: a model of 28 layers has about ten of them.
_init_one_jitted = jax.jit(_init_one, static_argnums=0)


def random_init(specs: Tree, key: jax.Array) -> Tree:
    """Random weights, made on the device: leaf i draws from fold_in(key, i)."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    arrays = [_init_one_jitted(spec, jax.random.fold_in(key, index)) for index, spec in enumerate(leaves)]
    return jax.tree.unflatten(treedef, arrays)
