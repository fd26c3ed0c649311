"""What decoder-only checkpoints in Hugging Face's layout share: the keys of `config.json` and the names of weights.

Defaults are those of transformers 5 (`Qwen2Config`, `Qwen3Config`); sizes have none, because a guessed size is a
wrong model.
"""

import math
from collections.abc import Mapping
from typing import Any

from miniinfer_jax.config import ROPE_SCALINGS, ConfigError, ModelConfig, RopeConfig

Config = Mapping[str, Any]

# Checkpoint name -> place in the parameter tree. A place may be a part of a joined weight: gate and up are gate_up;
# query heads, key and value of a kv head lie together in qkv.
DECODER_WEIGHTS = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.{layer}.input_layernorm.weight": "layers.{layer}.attention_norm",
    "model.layers.{layer}.self_attn.q_proj.weight": "layers.{layer}.qkv[:, :-2]",
    "model.layers.{layer}.self_attn.k_proj.weight": "layers.{layer}.qkv[:, -2]",
    "model.layers.{layer}.self_attn.v_proj.weight": "layers.{layer}.qkv[:, -1]",
    "model.layers.{layer}.self_attn.o_proj.weight": "layers.{layer}.o",
    "model.layers.{layer}.post_attention_layernorm.weight": "layers.{layer}.ffn_norm",
    "model.layers.{layer}.mlp.gate_proj.weight": "layers.{layer}.gate_up[0]",
    "model.layers.{layer}.mlp.up_proj.weight": "layers.{layer}.gate_up[1]",
    "model.layers.{layer}.mlp.down_proj.weight": "layers.{layer}.down",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}

# What a checkpoint may hold though the model has no parameter for it.
UNREAD_DECODER_WEIGHTS = frozenset(
    {
        "lm_head.weight",  # of a tied model: the embedding once more
        "model.layers.{layer}.self_attn.rotary_emb.inv_freq",  # a buffer that old releases saved; derived from theta
        "model.rotary_emb.inv_freq",
    }
)

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}

# Keys that change what a model computes and that nothing here implements -> the value that asks for nothing.
UNSUPPORTED_KEYS = {
    "quantization_config": {},
    "compression_config": {},
    "partial_rotary_factor": 1,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_causal": True,
    "use_bidirectional_attention": False,
}

ROPE_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


def decoder_config(
    hf: Config,
    architecture: str,
    *,
    qkv_bias: bool,
    qk_norm: bool,
    default_head_dim: int | None = None,
) -> ModelConfig:
    """The configuration of a decoder whose family differs in the given switches alone.

    default_head_dim: where `head_dim` is absent; None is hidden_size / num_attention_heads, as is a `null`.
    Raises ConfigError for a missing key, a value of the wrong kind, and what is not supported, by name.
    """
    refuse_unsupported(hf)
    num_heads = integer(hf, "num_attention_heads")
    vocab_size = integer(hf, "vocab_size")
    num_kv_heads = num_heads if hf.get("num_key_value_heads", 0) is None else integer(hf, "num_key_value_heads")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=integer(hf, "hidden_size"),
        num_layers=integer(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim(hf, default_head_dim),
        ffn_size=integer(hf, "intermediate_size"),
        max_position=integer(hf, "max_position_embeddings"),
        activation=activation(hf),
        norm_eps=number(hf, "rms_norm_eps", 1e-6),
        rope=rope_config(hf),
        tie_word_embeddings=switch(hf, "tie_word_embeddings"),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        sliding_windows=sliding_windows(hf),
        dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "float32"),
        eos_token_ids=token_ids(hf, "eos_token_id", vocab_size),
    )


def refuse_unsupported(hf: Config) -> None:
    for key, neutral in UNSUPPORTED_KEYS.items():
        value = hf.get(key)
        if value is not None and value != neutral:
            raise ConfigError(f"config.json has {key!r}: {value!r}, which is not supported (only {neutral!r} is)")


def integer(hf: Config, key: str, default: int | None = None) -> int:
    """The integer at `key`; without a default, the key must be there."""
    value = hf.get(key, default)
    if value is None:
        raise ConfigError(f"config.json lacks {key!r}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"config.json has {key!r}: {value!r}; it must be an integer")
    return value


def number(hf: Config, key: str, default: float | None = None) -> float:
    """The finite number at `key`, or the default where the key is absent or null."""
    value = hf.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"config.json lacks {key!r}")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"config.json has {key!r}: {value!r}; it must be a finite number")
    return float(value)


def switch(hf: Config, key: str, default: bool = False) -> bool:
    value = hf.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json has {key!r}: {value!r}; it must be true or false")
    return value


def token_ids(hf: Config, key: str, vocab_size: int) -> tuple[int, ...]:
    """One token id or a list of them as a tuple; ids past the vocabulary, which nothing can ever draw, are left out."""
    value = hf.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise ConfigError(f"{key!r} is {value!r}; it must be a token id or a list of token ids")
    return tuple(dict.fromkeys(token_id for token_id in ids if 0 <= token_id < vocab_size))


def head_dim(hf: Config, default: int | None) -> int:
    if hf.get("head_dim", default) is not None:
        return integer(hf, "head_dim", default)
    hidden_size, num_heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    if num_heads <= 0 or hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size ({hidden_size}) is no multiple of num_attention_heads ({num_heads}): "
            "config.json must give 'head_dim'"
        )
    return hidden_size // num_heads


def activation(hf: Config) -> str:
    name = hf.get("hidden_act", "silu")
    if name not in ACTIVATION_NAMES:
        raise ConfigError(f"hidden_act {name!r} is not supported; known: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def sliding_windows(hf: Config) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types` where given, else the layers from `max_window_layers` on have one."""
    num_layers = integer(hf, "num_hidden_layers")
    window = integer(hf, "sliding_window", 4096) if _uses_windows(hf) else None
    layer_types = hf.get("layer_types")
    if layer_types is None:
        first = integer(hf, "max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    for layer_type in layer_types:
        if layer_type not in known:
            raise ConfigError(f"layer_types holds {layer_type!r}; supported: {', '.join(known)}")
    if len(layer_types) != num_layers:
        raise ConfigError(f"layer_types has {len(layer_types)} entries for {num_layers} layers")
    if window is None and "sliding_attention" in layer_types:
        raise ConfigError("layer_types has 'sliding_attention', but use_sliding_window or sliding_window is off")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _uses_windows(hf: Config) -> bool:
    return switch(hf, "use_sliding_window") and hf.get("sliding_window", 4096) is not None


def rope_config(hf: Config) -> RopeConfig:
    """Rotary embedding from `rope_parameters` (transformers 5) or from `rope_scaling` and `rope_theta` (before)."""
    rope = _rope_values(hf)
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling not in ROPE_SCALINGS:
        raise ConfigError(f"rope type {scaling!r} is not supported; known: {', '.join(ROPE_SCALINGS)}")
    theta = number(rope, "rope_theta", number(hf, "rope_theta", 10_000.0))
    if scaling == "default":
        return RopeConfig(theta=theta)
    factor = number(rope, "factor")
    if scaling == "linear":
        return RopeConfig(theta=theta, scaling=scaling, factor=factor)
    length_key = "original_max_position_embeddings"
    original = integer(hf if hf.get(length_key) else rope, length_key, integer(hf, "max_position_embeddings"))
    if scaling == "llama3":
        return RopeConfig(
            theta=theta,
            scaling=scaling,
            factor=factor,
            original_max_position=original,
            low_freq_factor=number(rope, "low_freq_factor"),
            high_freq_factor=number(rope, "high_freq_factor"),
        )
    return RopeConfig(
        theta=theta,
        scaling=scaling,
        factor=factor,
        original_max_position=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(rope, factor),
        truncate=switch(rope, "truncate", True),
    )


def _rope_values(hf: Config) -> dict[str, Any]:
    old, new = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise ConfigError("rope_scaling and rope_parameters of config.json must be objects")
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise ConfigError(
                f"config.json contradicts itself on {key!r}: rope_scaling says {old[key]!r}, rope_parameters "
                f"{new[key]!r}; keep one of the two"
            )
    rope = {**old, **new}
    unknown = sorted(set(rope) - ROPE_KEYS)
    if unknown:
        raise ConfigError(f"rope parameter not supported: {', '.join(unknown)}; known: {', '.join(sorted(ROPE_KEYS))}")
    refuse_unsupported(rope)
    return rope


def _yarn_attention_factor(rope: Config, factor: float) -> float | None:
    """The given scale of attention, or the ratio of two mscales (as DeepSeek's files give it), or None: YaRN's own."""
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    if not (rope.get("mscale") and rope.get("mscale_all_dim")) or factor <= 1:
        return None
    numerator = 0.1 * number(rope, "mscale") * math.log(factor) + 1.0
    return numerator / (0.1 * number(rope, "mscale_all_dim") * math.log(factor) + 1.0)
