"""Qwen2 and Qwen2.5: biases on q, k and v; upper layers may have a sliding window (https://arxiv.org/abs/2407.10671)."""

from collections.abc import Mapping
from typing import Any

from miniinfer_jax.config import ModelConfig
from miniinfer_jax.models.huggingface import DECODER_WEIGHTS, UNREAD_DECODER_WEIGHTS, decoder_config

WEIGHT_MAP = {
    **DECODER_WEIGHTS,
    "model.layers.{layer}.self_attn.q_proj.bias": "layers.{layer}.qkv_bias[:, :-2]",
    "model.layers.{layer}.self_attn.k_proj.bias": "layers.{layer}.qkv_bias[:, -2]",
    "model.layers.{layer}.self_attn.v_proj.bias": "layers.{layer}.qkv_bias[:, -1]",
}
UNREAD_WEIGHTS = UNREAD_DECODER_WEIGHTS


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a Qwen2 `config.json`; ConfigError, by name, for what is missing or not supported."""
    return decoder_config(hf, "Qwen2ForCausalLM", qkv_bias=True, qk_norm=False)
