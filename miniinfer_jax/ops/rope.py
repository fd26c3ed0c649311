"""Rotary position embedding (https://arxiv.org/abs/2104.09864), by explicit positions."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from miniinfer_jax.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians a position for each pair [H / 2], and the factor by which cosines and sines are scaled."""
    # In float32 as the checkpoints' own code: at position 30,000 float64 frequencies turn by 1e-3 more.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(config.theta) ** exponents).astype(np.float32)
    if config.scaling == "linear":
        return frequencies / np.float32(config.factor), 1.0
    if config.scaling == "llama3":
        return _llama3(config, frequencies), 1.0
    if config.scaling == "yarn":
        return _yarn(config, frequencies, head_dim)
    return frequencies, 1.0


def _llama3(config: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1's release)."""
    wavelengths = 2 * np.pi / frequencies
    longest, shortest = (
        config.original_max_position / config.low_freq_factor,
        config.original_max_position / config.high_freq_factor,
    )
    smooth = (config.original_max_position / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / config.factor + smooth * frequencies
    stretched = np.where(wavelengths > longest, frequencies / config.factor, frequencies)
    is_between = (wavelengths <= longest) & (wavelengths >= shortest)
    return np.where(is_between, blended, stretched).astype(np.float32)


def _yarn(config: RopeConfig, frequencies: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """Interpolates pairs that turn less than beta_slow times over the original context, keeps those above beta_fast.

    Sections 3.2 and 3.4 of https://arxiv.org/abs/2309.00071; the attention factor is 0.1 ln(factor) + 1.
    """

    def pair_turning(num_turns: float) -> float:
        angle = config.original_max_position / (num_turns * 2 * math.pi)
        return head_dim * math.log(angle) / (2 * math.log(config.theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    scaled = frequencies / config.factor * ramp + frequencies * (1 - ramp)
    attention_factor = config.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(config.factor) + 1.0
    return scaled.astype(np.float32), attention_factor


def rope_table(config: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [T, H / 2] float32 of positions [T]."""
    frequencies, factor = inverse_frequencies(config, head_dim)
    angles = positions[:, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rope(x: jax.Array, table: tuple[jax.Array, jax.Array], interleaved: bool = False) -> jax.Array:
    """x [T, N, H] with each pair of features turned by its position's angle.

    Pairs are (i, i + H/2), as Qwen2 and Llama checkpoints in Hugging Face's layout, or with
    `interleaved` (2i, 2i + 1), as the paper. Computed in float32, returned in x's dtype.
    """
    cosines, sines = (part[:, None, :] for part in table)  # [T, 1, H / 2]
    values = x.astype(jnp.float32)
    if interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
    else:
        first, second = jnp.split(values, 2, axis=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    joined = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return joined.astype(x.dtype)
