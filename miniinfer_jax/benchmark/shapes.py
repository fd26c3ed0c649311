"""Published model shapes, as the config.json values that matter, to measure with random weights and no download."""

import json
from pathlib import Path
from typing import Any

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
_QWEN3 = {
    **_QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "head_dim": 128,
}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**_QWEN2, **_sizes(64, 2, 4, 2, 128, 512, True), "eos_token_id": 0},  # no model's; runs anywhere
    "qwen2.5-0.5b": {**_QWEN2, **_sizes(896, 24, 14, 2, 4864, 151_936, True)},
    "qwen2.5-1.5b": {**_QWEN2, **_sizes(1536, 28, 12, 2, 8960, 151_936, True)},
    "qwen2.5-7b": {**_QWEN2, **_sizes(3584, 28, 28, 4, 18944, 152_064, False)},
    "qwen3-0.6b": {**_QWEN3, **_sizes(1024, 28, 16, 8, 3072, 151_936, True)},
    "qwen3-8b": {**_QWEN3, **_sizes(4096, 36, 32, 8, 12288, 151_936, False)},
}


def write_shape(name: str, folder: Path) -> Path:
    """The folder, now holding the config.json of a published shape. Raises ValueError for a name not in SHAPES."""
    if name not in SHAPES:
        raise ValueError(f"no published shape is called {name!r}; known: {', '.join(SHAPES)}")
    (folder / "config.json").write_text(json.dumps(SHAPES[name], indent=2), encoding="utf-8")
    return folder
