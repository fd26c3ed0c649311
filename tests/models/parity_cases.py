"""The models on which the engine is compared with transformers, and what transformers answered. No torch in here.

Weights are multiples of 1/64 of at most 8 bits, which float32, bfloat16 and float16 hold exactly: one checkpoint and
one float32 answer serve all three.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

NUM_GREEDY = 64
SHORT_PROMPT = 5  # the second prompt of the greedy check: the first tokens of the first one
GOLDENS = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Case:
    """A family, the seed of weights and tokens, what config.json says beyond SIZES, and the prompt's length.

    Seeds are those for which greedy continuations have no tie and no short loop (make_goldens.py asserts both).
    """

    family: str
    seed: int
    changes: dict[str, Any]
    prompt_len: int = 80


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LONG = {"max_position_embeddings": 4096}
WINDOWS = {"use_sliding_window": True, "num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def heads(num_heads: int, num_kv_heads: int, hidden_size: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "hidden_size": hidden_size}


CASES = {
    "qwen2-mha": Case("qwen2", 8, heads(4, 4, 32) | {"vocab_size": 101}),
    "qwen2-gqa2-tied": Case("qwen2", 12, {"tie_word_embeddings": True}),
    "qwen2-gqa7": Case("qwen2", 4, heads(7, 1, 56) | {"vocab_size": 211}),
    "qwen2-gqa7-tied": Case("qwen2", 1, heads(14, 2, 56) | {"tie_word_embeddings": True}),
    "qwen2-gqa8-gelu": Case("qwen2", 0, heads(8, 1, 64) | {"hidden_act": "gelu", "rms_norm_eps": 1e-5}),
    "qwen2-head-dim": Case("qwen2", 1, {"head_dim": 12, "vocab_size": 503}),
    "qwen2-upper-windows": Case("qwen2", 3, WINDOWS | {"sliding_window": 9, "max_window_layers": 2}),
    "qwen2-all-windows": Case(
        "qwen2",
        0,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0, "tie_word_embeddings": True},
    ),
    "qwen2-long": Case("qwen2", 8, LONG | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 2050),
    "qwen2-linear": Case("qwen2", 2, {"rope_parameters": LINEAR}),
    "qwen2-llama3": Case("qwen2", 8, LONG | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, 1100),
    "qwen3-gqa2": Case("qwen3", 1, {"head_dim": 16, "vocab_size": 99}),
    "qwen3-gqa7": Case("qwen3", 2, heads(7, 1, 48) | {"head_dim": 8}),
    "qwen3-gqa8-tied": Case("qwen3", 4, heads(16, 2, 40) | {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-windows": Case(
        "qwen3",
        4,
        WINDOWS | {"head_dim": 8, "sliding_window": 13, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen3-yarn": Case("qwen3", 1, LONG | {"head_dim": 16, "rope_parameters": YARN}, 1100),
}
HALF_CASES = ("qwen2-gqa2-tied", "qwen3-windows")
GOLDEN_CASES = ("qwen2-gqa7", "qwen2-upper-windows", "qwen3-gqa8-tied", "qwen3-yarn")


@dataclass(frozen=True)
class Expected:
    """A checkpoint, and what transformers answers to it. Letters: T tokens, r rows kept, V vocabulary, 2 prompts."""

    hf_config: dict[str, Any]
    weight_shapes: dict[str, list[int]]  # by name in the checkpoint, in the order in which they are drawn
    seed: int
    tokens: np.ndarray  # [T]
    rows: np.ndarray  # [r], the tokens whose logits are kept
    logits: np.ndarray  # [r, V] float32
    prompt_logprobs: np.ndarray  # [T - 1], of every token after the first
    greedy_ids: np.ndarray  # [2, NUM_GREEDY], after all tokens, and after the first SHORT_PROMPT
    greedy_logprobs: np.ndarray  # [2, NUM_GREEDY]
    half_errors: dict[str, list[float]]  # dtype -> largest and mean error of transformers' own logits in it

    @property
    def prompts(self) -> list[list[int]]:
        return [self.tokens.tolist(), self.tokens[:SHORT_PROMPT].tolist()]


ARRAYS = ("tokens", "rows", "logits", "prompt_logprobs", "greedy_ids", "greedy_logprobs")
VALUES = ("hf_config", "weight_shapes", "seed", "half_errors")


def save_expected(path: Path, expected: Expected) -> None:
    """Arrays as they are, everything else as one JSON text."""
    values = json.dumps({name: getattr(expected, name) for name in VALUES})
    np.savez_compressed(path, values=np.array(values), **{name: getattr(expected, name) for name in ARRAYS})


def load_expected(path: Path) -> Expected:
    with np.load(path, allow_pickle=False) as file:
        return Expected(**json.loads(str(file["values"])), **{name: file[name] for name in ARRAYS})


def random_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Weights that keep activations near 1; norms and biases too, which would hide a mix-up if they were constant.

    RandomState's stream is frozen for all versions of numpy, so that a golden needs the seed alone.
    """
    generator = np.random.RandomState(seed)
    weights = {}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + values / 4
        elif name.endswith(".bias") or "embed_tokens" in name:
            values = values / 8  # a large embedding, tied, would find every token to be its own successor
        else:
            values = values / np.sqrt(shape[-1])
        weights[name] = (np.clip(np.round(values * 64), -127, 127) / 64).astype(np.float32)
    return weights


def write_checkpoint(folder: Path, expected: Expected) -> None:
    """The checkpoint of a golden, as transformers would save it."""
    save_file(random_weights(expected.weight_shapes, expected.seed), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(expected.hf_config))
