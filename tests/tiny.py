"""Tiny checkpoints in Hugging Face layout, made without torch, and the slow and obvious way to continue a prompt."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import fresh_inputs
from miniinfer_jax.models.decoder import forward, logits, param_specs
from miniinfer_jax.params import random_init
from miniinfer_jax.weights import read_model_config, save_params

TINY_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "eos_token_id": 3,
    "use_sliding_window": True,
    "sliding_window": 40,
    "max_window_layers": 1,
}


def make_checkpoint(folder: Path, seed: int = 0, nan_token: int | None = None, **changes: Any) -> Path:
    """A random checkpoint; with `nan_token`, reading that token poisons everything computed from it."""
    folder.mkdir(parents=True, exist_ok=True)
    hf_config = TINY_CONFIG | changes
    (folder / "config.json").write_text(json.dumps(hf_config))
    config = read_model_config(folder)
    specs = param_specs(config, "float32")
    # Three times the usual spread: continuations then differ from prompt to prompt.
    params = jax.tree.map(
        lambda array: array * 3 if array.ndim > 1 else array, random_init(specs, jax.random.key(seed))
    )
    if nan_token is not None:
        params = params.replace(embedding=params.embedding.at[nan_token].set(jnp.nan))
    save_params(folder, params, specs, hf_config)
    return folder


def continue_greedily(llm: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The whole sequence through the forward again for each token: no pages are reused, nothing is batched."""
    config, params = llm.model_config, llm.engine._runner._params
    page_size, length = 16, len(prompt) + num_tokens

    @jax.jit
    def next_token(token_ids: jax.Array, last: jax.Array) -> jax.Array:
        cache = kv_cache.create(config, -(-length // page_size), page_size, "float32")
        hidden, _ = forward(config, params, cache, fresh_inputs(token_ids[None], page_size))
        return jnp.argmax(logits(params, hidden)[last])

    token_ids = np.zeros(length, np.int32)
    token_ids[: len(prompt)] = prompt
    for position in range(len(prompt), length):
        token_ids[position] = next_token(token_ids, position - 1)
    return token_ids[len(prompt) :].tolist()
