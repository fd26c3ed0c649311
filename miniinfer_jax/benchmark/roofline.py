"""The least that a step must move and compute, from the architecture alone. Pure arithmetic, standard library only.

Counted: every weight that the step reads, once; the live keys and values, read once; the new ones, written once;
the float32 logits, written once and read once. Activations are left out: they can stay on the chip. So every
figure is a lower bound, and "share" is how much of the device's ceiling the measured time reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from miniinfer_jax.config import ModelConfig

LOGIT_BYTES = 4  # float32


@dataclass(frozen=True)
class StepCost:
    """Bytes moved and floating-point operations (a multiply-add is two) of one step, or of a sum of steps."""

    weight_bytes: int = 0
    kv_bytes: int = 0
    logits_bytes: int = 0
    operations: int = 0

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.logits_bytes

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.logits_bytes + other.logits_bytes,
            self.operations + other.operations,
        )


@dataclass(frozen=True)
class Ceilings:
    """What the device reached when measured: bytes read a second, floating-point operations a second."""

    bytes_per_second: float
    operations_per_second: float


def least_seconds(cost: StepCost, ceilings: Ceilings) -> float:
    """The time below which the device cannot do `cost`: memory and arithmetic overlap, the slower one counts."""
    return max(cost.num_bytes / ceilings.bytes_per_second, cost.operations / ceilings.operations_per_second)


def layer_matmul_params(config: ModelConfig) -> int:
    """Weights of one layer's matrices: q, k, v, output, gate, up and down."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and output; k and v
    return config.hidden_size * (heads * config.head_dim + 3 * config.ffn_size)


def layer_params(config: ModelConfig) -> int:
    """All weights of one layer: its matrices, its biases and its norms."""
    biases = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim if config.qkv_bias else 0
    norms = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    return layer_matmul_params(config) + biases + norms


def num_params(config: ModelConfig) -> int:
    """All weights of the model; tied embeddings are counted once."""
    tables = 1 if config.tie_word_embeddings else 2
    embeddings = tables * config.vocab_size * config.hidden_size
    return config.num_layers * layer_params(config) + config.hidden_size + embeddings


def _weight_bytes(config: ModelConfig, num_tokens: int, itemsize: int) -> int:
    """Each layer, the last norm and the output head once; of the embedding table, a row a token."""
    head = config.vocab_size * config.hidden_size
    rows = num_tokens * config.hidden_size
    return (config.num_layers * layer_params(config) + config.hidden_size + head + rows) * itemsize


def _token_kv_values(config: ModelConfig) -> int:
    """Numbers that one token keeps in one layer: its key and its value."""
    return 2 * config.num_kv_heads * config.head_dim


def _sum_to(length: int, window: int | None) -> int:
    """Keys attended to by tokens 1..length of a sequence, summed, when each sees at most the last `window`."""
    limit = length if window is None else min(length, window)
    return limit * (limit + 1) // 2 + (length - limit) * limit


def _attention_operations(config: ModelConfig, num_query_key_pairs: int) -> int:
    """Of one layer: q.k and p.v, each a multiply-add a head dimension."""
    return 4 * config.num_heads * config.head_dim * num_query_key_pairs


def decode_cost(config: ModelConfig, context_lens: Sequence[int], weight_itemsize: int, kv_itemsize: int) -> StepCost:
    """One decode step: one token for each sequence, which attends to context_lens[b] keys (its own counted).

    Itemsizes in bytes.
    """
    batch_size = len(context_lens)
    attention = decode_attention_cost(config, context_lens, kv_itemsize)
    kv_written = config.num_layers * batch_size * _token_kv_values(config) * kv_itemsize
    matmul_params = config.num_layers * layer_matmul_params(config) + config.vocab_size * config.hidden_size
    return StepCost(
        weight_bytes=_weight_bytes(config, batch_size, weight_itemsize),
        kv_bytes=attention.kv_bytes + kv_written,
        logits_bytes=2 * batch_size * config.vocab_size * LOGIT_BYTES,
        operations=2 * batch_size * matmul_params + attention.operations,
    )


def decode_attention_cost(config: ModelConfig, context_lens: Sequence[int], kv_itemsize: int) -> StepCost:
    """Attention of one decode step by itself, all layers together: the live keys and values, read once."""
    keys = [sum(c if w is None else min(c, w) for c in context_lens) for w in config.sliding_windows]  # a layer
    return StepCost(
        kv_bytes=sum(keys) * _token_kv_values(config) * kv_itemsize,
        operations=sum(_attention_operations(config, pairs) for pairs in keys),
    )


def prefill_cost(config: ModelConfig, prompt_lens: Sequence[int], weight_itemsize: int, kv_itemsize: int) -> StepCost:
    """One prefill step over whole prompts: keys and values written and read once, logits of each last token."""
    num_tokens, batch_size = sum(prompt_lens), len(prompt_lens)
    pairs = sum(_sum_to(length, window) for length in prompt_lens for window in config.sliding_windows)
    head = config.vocab_size * config.hidden_size
    matmuls = num_tokens * config.num_layers * layer_matmul_params(config) + batch_size * head
    return StepCost(
        weight_bytes=_weight_bytes(config, num_tokens, weight_itemsize),
        kv_bytes=2 * num_tokens * config.num_layers * _token_kv_values(config) * kv_itemsize,
        logits_bytes=2 * batch_size * config.vocab_size * LOGIT_BYTES,
        operations=2 * matmuls + _attention_operations(config, pairs),
    )


def decode_run_cost(
    config: ModelConfig,
    lengths: Sequence[tuple[int, int]],
    max_num_seqs: int,
    weight_itemsize: int,
    kv_itemsize: int,
) -> StepCost:
    """All decode steps that requests of (prompt, output) lengths need when batched as densely as can be.

    The first output token comes from prefill. The weights are read in at least as many steps as the longest
    output needs, and as a full batch needs for all tokens.
    """
    outputs = [output_len - 1 for _, output_len in lengths]
    num_tokens = sum(outputs)
    num_steps = max(-(-num_tokens // max_num_seqs), max(outputs, default=0))
    pairs = sum(
        _sum_to(prompt_len + output_len - 1, window) - _sum_to(prompt_len, window)
        for prompt_len, output_len in lengths
        for window in config.sliding_windows
    )
    kv_written = num_tokens * config.num_layers
    matmul_params = config.num_layers * layer_matmul_params(config) + config.vocab_size * config.hidden_size
    weights = num_steps * _weight_bytes(config, 0, weight_itemsize)
    return StepCost(
        weight_bytes=weights + num_tokens * config.hidden_size * weight_itemsize,
        kv_bytes=(pairs + kv_written) * _token_kv_values(config) * kv_itemsize,
        logits_bytes=2 * num_tokens * config.vocab_size * LOGIT_BYTES,
        operations=2 * num_tokens * matmul_params + _attention_operations(config, pairs),
    )
