"""A tree of ParamSpec: what derives from it (abstract arrays, sizes, random weights) agrees with it leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.params import ParamSpec, abstract_arrays, is_spec, map_specs, num_bytes, random_init

SPECS = {
    "matrix": ParamSpec((64, 48), ("ffn", "embed"), "float32"),
    "output": ParamSpec((64, 4, 16), ("embed", "heads", "head_dim"), "float32", num_input_axes=2),
    "bias": ParamSpec((4, 16), ("heads", "head_dim"), "bfloat16", init="zeros"),
    "norm": ParamSpec((48,), ("embed",), "float16", init="ones"),
    "absent": None,
}


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=is_spec)


def test_every_axis_has_a_name():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and axes \('embed',\) differ in length"):
        ParamSpec((2, 3), ("embed",), "float32")


def test_map_specs_keeps_the_tree():
    shapes = map_specs(lambda spec: list(spec.shape), SPECS)
    assert shapes == {"matrix": [64, 48], "output": [64, 4, 16], "bias": [4, 16], "norm": [48], "absent": None}


def test_abstract_arrays_and_random_weights_have_the_declared_shapes():
    arrays = random_init(SPECS, jax.random.key(0))
    for spec, abstract, array in zip(leaves(SPECS), leaves(abstract_arrays(SPECS)), leaves(arrays), strict=True):
        assert abstract.shape == array.shape == spec.shape
        assert abstract.dtype == array.dtype == jnp.dtype(spec.dtype)


def test_num_bytes_is_what_the_arrays_take():
    assert num_bytes(SPECS) == sum(array.nbytes for array in leaves(random_init(SPECS, jax.random.key(0))))
    large = ParamSpec((152_064, 8_192, 64), ("vocab", "embed", "layers"), "bfloat16")  # past 32 bits, without memory
    assert num_bytes(large) == 152_064 * 8_192 * 64 * 2


def test_random_weights_keep_the_size_of_what_they_multiply():
    arrays = random_init(SPECS, jax.random.key(1))
    assert np.std(arrays["matrix"]) == pytest.approx(48**-0.5, rel=0.05)
    assert np.std(arrays["output"]) == pytest.approx((4 * 16) ** -0.5, rel=0.05)
    assert abs(np.mean(arrays["matrix"])) < 0.01
    assert not np.any(np.asarray(arrays["bias"], np.float32))
    assert np.all(np.asarray(arrays["norm"], np.float32) == 1)


def test_random_weights_follow_the_key_and_differ_from_leaf_to_leaf():
    twins = [ParamSpec((8, 8), ("ffn", "embed"), "float32")] * 2
    first, second = random_init(twins, jax.random.key(0))
    again, _ = random_init(twins, jax.random.key(0))
    other, _ = random_init(twins, jax.random.key(1))
    assert jnp.array_equal(first, again)
    assert not jnp.array_equal(first, second)
    assert not jnp.array_equal(first, other)
