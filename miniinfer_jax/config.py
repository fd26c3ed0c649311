"""What a model is and how an engine runs it: frozen, hashable values, validated when they are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "leaky_relu", "tanh", "sigmoid")
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


class ConfigError(ValueError):
    """A model or engine configuration that cannot be used; says which field, the value and the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, pairing and how frequencies are stretched for long contexts.

    scaling: "default" (none), "linear", "llama3" or "yarn" (https://arxiv.org/abs/2309.00071); the other
    fields are read by the scalings that use them and carry the names of Hugging Face's `rope_parameters`.
    """

    theta: float = 10_000.0
    interleaved: bool = False  # pairs (0, 1), (2, 3), ... as the original; else (i, i + H/2) as Qwen2 and Llama
    scaling: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _require(self.theta > 0 and math.isfinite(self.theta), f"rope theta is {self.theta}; it must be positive")
        _require(
            self.scaling in ROPE_SCALINGS,
            f"rope scaling {self.scaling!r} is not supported; known: {', '.join(ROPE_SCALINGS)}",
        )
        _require(self.factor >= 1.0, f"rope scaling factor is {self.factor}; it must be at least 1")
        needs_original = self.scaling in ("llama3", "yarn")
        _require(
            not needs_original or self.original_max_position > 0,
            f"rope scaling {self.scaling!r} needs original_max_position_embeddings",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder-only architecture; static under `jax.jit`.

    `sliding_windows` has one entry a layer: None attends to everything before, w to the last w positions
    (the token itself counted).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_position: int
    activation: str = "silu"
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    dtype: str = "bfloat16"  # the checkpoint's own
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
        for name in (*sizes, "max_position"):
            value = getattr(self, name)
            is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
            _require(is_size, f"{name} is {value!r}; it must be a positive integer")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        _require(
            self.activation in ACTIVATIONS,
            f"activation {self.activation!r} is not known; known: {', '.join(ACTIVATIONS)}",
        )
        _require(self.dtype in DTYPES, f"dtype {self.dtype!r} is not supported; use one of {', '.join(DTYPES)}")
        _require(self.norm_eps > 0, f"norm_eps is {self.norm_eps}; it must be positive")
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        _require(
            len(self.sliding_windows) == self.num_layers,
            f"sliding_windows has {len(self.sliding_windows)} entries for {self.num_layers} layers",
        )
        _require(
            all(window is None or window > 0 for window in self.sliding_windows),
            f"sliding_windows holds {self.sliding_windows}; a window is None or a positive number of tokens",
        )


@dataclass(frozen=True)
class EngineConfig:
    """How one engine runs: limits of a step, the page pool and the modes. Every size is in tokens, sequences or pages.

    Sizes left at None are chosen when the engine starts, from the model and the device's memory. scheduling_policy and
    policy_options are the name and the arguments of a policy in `engine/policies.py`. target_itl_ms: milliseconds from
    a token of a request to its next, to which prompts have to keep; None: prompts are computed as fast as it goes.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    dtype: str = "auto"
    seed: int = 0
    deterministic: bool = False
    attention_backend: str = "auto"
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    policy_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    target_itl_ms: float | None = None
    kv_offload_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "page_size", "num_pages"):
            value = getattr(self, name)
            optional = name in ("max_model_len", "num_pages") and value is None
            is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
            _require(optional or is_size, f"{name} is {value!r}; it must be a positive integer")
        is_count = isinstance(self.kv_offload_bytes, int) and not isinstance(self.kv_offload_bytes, bool)
        _require(
            is_count and self.kv_offload_bytes >= 0,
            f"kv_offload_bytes is {self.kv_offload_bytes!r}; it must be an integer, 0 or more",
        )
        _require(
            self.kv_offload_bytes == 0 or self.enable_prefix_caching,
            f"kv_offload_bytes is {self.kv_offload_bytes}, and pages are found again by the prefix cache alone: "
            "set enable_prefix_caching=True, or kv_offload_bytes=0",
        )
        _require(
            isinstance(self.enable_prefix_caching, bool),
            f"enable_prefix_caching is {self.enable_prefix_caching!r}; it must be True or False",
        )
        _require(
            0.0 < self.gpu_memory_utilization <= 1.0,
            f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be in (0, 1]",
        )
        _require(
            self.dtype == "auto" or self.dtype in DTYPES,
            f"dtype {self.dtype!r} is not supported; use 'auto' or one of {', '.join(DTYPES)}",
        )
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**32
        _require(is_seed, f"seed is {self.seed!r}; it must be an integer in [0, 2**32)")
        _require(
            isinstance(self.policy_options, Mapping),
            f"policy_options is {self.policy_options!r}; give options by name, for example {{'ageing': 0.01}}",
        )
        if self.target_itl_ms is not None:
            is_number = isinstance(self.target_itl_ms, int | float) and not isinstance(self.target_itl_ms, bool)
            is_time = is_number and 0 < self.target_itl_ms < math.inf
            _require(is_time, f"target_itl_ms is {self.target_itl_ms!r}; it must be a positive number of milliseconds")
            _require(
                not self.deterministic,
                f"target_itl_ms is {self.target_itl_ms} and deterministic is True: deterministic steps are all of one "
                "size, so there is nothing to choose; drop one of the two",
            )
