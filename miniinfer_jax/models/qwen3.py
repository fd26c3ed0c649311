"""Qwen3, dense: q and k are normalized per head, and there are no biases (https://arxiv.org/abs/2505.09388)."""

from collections.abc import Mapping
from typing import Any

from miniinfer_jax.config import ConfigError, ModelConfig
from miniinfer_jax.models.huggingface import DECODER_WEIGHTS, UNREAD_DECODER_WEIGHTS, decoder_config, switch

WEIGHT_MAP = {
    **DECODER_WEIGHTS,
    "model.layers.{layer}.self_attn.q_norm.weight": "layers.{layer}.q_norm",
    "model.layers.{layer}.self_attn.k_norm.weight": "layers.{layer}.k_norm",
}
UNREAD_WEIGHTS = UNREAD_DECODER_WEIGHTS


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a Qwen3 `config.json`; ConfigError, by name, for what is missing or not supported."""
    if switch(hf, "attention_bias"):
        # It would also put a bias on the output projection; no published Qwen3 checkpoint has one.
        raise ConfigError("config.json has 'attention_bias': true, which is not supported for Qwen3")
    return decoder_config(hf, "Qwen3ForCausalLM", qkv_bias=False, qk_norm=True, default_head_dim=128)
