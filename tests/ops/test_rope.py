"""Rotary embedding against its definition in complex float64, and against transformers where it is installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from miniinfer_jax.config import RopeConfig
from miniinfer_jax.ops.rope import inverse_frequencies, rope, rope_table

HEAD_DIM = 16
SCALINGS = {
    "default": RopeConfig(theta=10_000.0),
    "long": RopeConfig(theta=1_000_000.0),
    "linear": RopeConfig(theta=10_000.0, scaling="linear", factor=4.0),
    "llama3": RopeConfig(
        theta=500_000.0, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position=256,
    ),
    "yarn": RopeConfig(theta=1_000_000.0, scaling="yarn", factor=4.0, original_max_position=1024),
    "yarn_given": RopeConfig(
        theta=10_000.0, scaling="yarn", factor=8.0, original_max_position=512, beta_fast=16.0, beta_slow=2.0,
        attention_factor=0.9, truncate=False,
    ),
}  # fmt: skip


def heads(num_tokens, seed=0, dtype="float32", head_dim=HEAD_DIM):
    """[T, N, H]"""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((num_tokens, 3, head_dim)), dtype)


def turned(x, positions, frequencies, interleaved):
    """x [T, N, H] as complex numbers, each multiplied by exp(i * position * frequency), in float64."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    angles = np.asarray(positions, np.float64)[:, None, None] * frequencies
    product = (first + 1j * second) * np.exp(1j * angles)
    result = np.empty_like(x)
    if interleaved:
        result[..., 0::2], result[..., 1::2] = product.real, product.imag
    else:
        result[..., :half], result[..., half:] = product.real, product.imag
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("head_dim", [2, 16, 64])
def test_every_pair_is_turned_by_its_angle(interleaved, theta, head_dim):
    x, positions = heads(40, head_dim=head_dim), jnp.arange(40) * 7
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    table = rope_table(RopeConfig(theta=theta, interleaved=interleaved), head_dim, positions)
    expected = turned(x, positions, frequencies, interleaved)
    # An angle of 280 radians is known in float32 to 2e-5.
    np.testing.assert_allclose(rope(x, table, interleaved), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_offsets_and_slices_are_only_positions(interleaved):
    x, positions, config = heads(24), jnp.arange(24) + 1000, SCALINGS["long"]
    whole = rope(x, rope_table(config, HEAD_DIM, positions), interleaved)
    order = np.random.default_rng(1).permutation(24)
    for part in (slice(0, 5), slice(17, 24), order):
        table = rope_table(config, HEAD_DIM, positions[part])
        np.testing.assert_allclose(rope(x[part], table, interleaved), whole[part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved):
    query, key = heads(1, seed=1), heads(1, seed=2)

    def score(query_position, key_position):
        one, other = (
            rope(x, rope_table(SCALINGS["default"], HEAD_DIM, jnp.asarray([position])), interleaved)
            for x, position in ((query, query_position), (key, key_position))
        )
        return np.sum(np.asarray(one, np.float64) * np.asarray(other, np.float64))

    assert score(9, 4) == pytest.approx(score(1009, 1004), abs=2e-3)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=2e-3)


def test_position_zero_changes_nothing_and_the_pairings_differ_by_an_order_of_features():
    x = heads(6)
    table = rope_table(SCALINGS["default"], HEAD_DIM, jnp.zeros(6, jnp.int32))
    np.testing.assert_array_equal(rope(x, table), x)
    table = rope_table(SCALINGS["default"], HEAD_DIM, jnp.arange(6))
    order = np.arange(HEAD_DIM).reshape(2, -1).T.reshape(-1)  # 0, H/2, 1, H/2 + 1, ...
    np.testing.assert_array_equal(rope(x[..., order], table, interleaved=True), rope(x, table)[..., order])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_turned_in_float32(dtype):
    x, positions = heads(20, dtype=dtype), jnp.arange(20) + 2000
    table = rope_table(SCALINGS["default"], HEAD_DIM, positions)
    result = rope(x, table)
    assert result.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(result, rope(x.astype(jnp.float32), table).astype(dtype))


def test_linear_stretches_positions():
    x, positions = heads(10), jnp.arange(10)
    stretched = rope(x, rope_table(SCALINGS["linear"], HEAD_DIM, positions * 4))
    plain = rope(x, rope_table(SCALINGS["default"], HEAD_DIM, positions))
    np.testing.assert_allclose(stretched, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama3", "yarn", "yarn_given"])
def test_fast_pairs_are_kept_and_slow_ones_stretched(name):
    config = SCALINGS[name]
    plain, _ = inverse_frequencies(RopeConfig(theta=config.theta), 64)
    scaled, factor = inverse_frequencies(config, 64)
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[-1], plain[-1] / config.factor, rtol=1e-6)
    assert np.all(np.diff(scaled) < 0) and np.any((scaled < plain * 0.99) & (scaled > plain / config.factor * 1.01))
    expected_factor = {"llama3": 1.0, "yarn": 0.1 * np.log(4.0) + 1.0, "yarn_given": 0.9}[name]
    assert factor == pytest.approx(expected_factor)


def hf_config(config, head_dim):
    """The Qwen2 configuration of transformers with the same rotary embedding."""
    transformers = pytest.importorskip("transformers")
    rope_parameters = {"rope_type": config.scaling, "rope_theta": config.theta, "factor": config.factor}
    if config.scaling in ("llama3", "yarn"):
        rope_parameters["original_max_position_embeddings"] = config.original_max_position
    if config.scaling == "llama3":
        rope_parameters |= {"low_freq_factor": config.low_freq_factor, "high_freq_factor": config.high_freq_factor}
    if config.scaling == "yarn":
        rope_parameters |= {"beta_fast": config.beta_fast, "beta_slow": config.beta_slow, "truncate": config.truncate}
    if config.attention_factor is not None:
        rope_parameters["attention_factor"] = config.attention_factor
    return transformers.Qwen2Config(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=rope_parameters,
    )


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_transformers_agrees(name, head_dim):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    config = SCALINGS[name]
    embedding = modeling.Qwen2RotaryEmbedding(hf_config(config, head_dim))
    frequencies, factor = inverse_frequencies(config, head_dim)
    np.testing.assert_allclose(frequencies, embedding.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(embedding.attention_scaling)

    positions = np.array([0, 1, 5, 100, 1023, 2047, 4000])
    x = heads(len(positions), head_dim=head_dim)
    query = torch.tensor(np.asarray(x)).transpose(0, 1)[None]  # [1, N, T, H]
    cosines, sines = embedding(query, torch.tensor(positions)[None])
    expected, _ = modeling.apply_rotary_pos_emb(query, query, cosines, sines)
    result = rope(x, rope_table(config, head_dim, jnp.asarray(positions)))
    # At position 4,000 one unit in the last place of a frequency turns by up to 5e-4.
    np.testing.assert_allclose(result, expected[0].transpose(0, 1).numpy(), atol=1e-3)
    np.testing.assert_allclose(result[:4], expected[0, :, :4].transpose(0, 1).numpy(), atol=2e-5)
