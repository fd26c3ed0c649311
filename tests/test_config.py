"""Configurations are checked when they are made: what cannot be used is refused by field, value and remedy."""

import dataclasses

import pytest

from miniinfer_jax.config import ConfigError, EngineConfig, ModelConfig, RopeConfig

SIZES = {
    "architecture": "Qwen2ForCausalLM",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_size": 48,
    "max_position": 64,
}


def test_equal_configs_are_equal_and_hash_alike():
    first, second = ModelConfig(**SIZES), ModelConfig(**SIZES)
    assert first == second and hash(first) == hash(second)
    assert hash(EngineConfig()) == hash(EngineConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.vocab_size = 97


def test_a_layer_without_a_window_sees_everything():
    assert ModelConfig(**SIZES).sliding_windows == (None, None, None)
    windows = (None, 8, 8)
    assert ModelConfig(**SIZES, sliding_windows=windows).sliding_windows == windows


@pytest.mark.parametrize("name", [name for name in SIZES if name != "architecture"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "8"])
def test_model_sizes_are_positive_integers(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}; it must be a positive integer"):
        ModelConfig(**{**SIZES, name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"head_dim": 7}, "head_dim is 7; rotary embedding needs an even number"),
        ({"activation": "mish"}, "activation 'mish' is not known; known: silu, gelu"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported; use one of float32, bfloat16, float16"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be positive"),
        ({"sliding_windows": (None, 8)}, "sliding_windows has 2 entries for 3 layers"),
        ({"sliding_windows": (None, 8, 0)}, "a window is None or a positive number of tokens"),
    ],
)
def test_models_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**SIZES, **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"theta": 0.0}, "rope theta is 0.0; it must be positive"),
        ({"theta": float("inf")}, "rope theta is inf"),
        ({"theta": float("nan")}, "rope theta is nan"),
        ({"scaling": "dynamic"}, "rope scaling 'dynamic' is not supported; known: default, linear, llama3, yarn"),
        ({"scaling": "linear", "factor": 0.5}, "rope scaling factor is 0.5; it must be at least 1"),
        ({"scaling": "yarn", "factor": 4.0}, "rope scaling 'yarn' needs original_max_position_embeddings"),
        ({"scaling": "llama3", "factor": 4.0}, "rope scaling 'llama3' needs original_max_position_embeddings"),
    ],
)
def test_rope_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be a positive integer"),
        ({"max_num_seqs": None}, "max_num_seqs is None"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens is -1"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"page_size": 16.0}, "page_size is 16.0"),
        ({"num_pages": True}, "num_pages is True"),
        ({"gpu_memory_utilization": 0.0}, r"gpu_memory_utilization is 0.0; it must be in \(0, 1\]"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization is 1.1"),
        ({"dtype": "float64"}, "dtype 'float64' is not supported; use 'auto' or one of float32"),
        ({"seed": -1}, "seed is -1; it must be an integer in"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_engines_that_cannot_run_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**change)


def test_engine_limits_are_inside():
    EngineConfig(gpu_memory_utilization=1.0, seed=2**32 - 1, max_model_len=None, num_pages=None, max_num_seqs=1)
