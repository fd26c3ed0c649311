"""Every decoder-only family: pre-norm blocks of grouped-query attention and a gated feed-forward network.

One forward serves prefill, decode, scoring and training; it sees arrays, never a request.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from miniinfer_jax import kv_cache
from miniinfer_jax.batch import DecodeInputs, PrefillInputs
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.kv_cache import KVCache
from miniinfer_jax.ops.attention import BACKENDS, AttentionBackend, attention
from miniinfer_jax.ops.linear import PLAIN, Products, linear
from miniinfer_jax.ops.norms import rms_norm
from miniinfer_jax.ops.rope import rope, rope_table
from miniinfer_jax.params import ParamSpec

Array = jax.Array
Leaf = Any  # a jax.Array, or what stands for it: a ParamSpec, a jax.ShapeDtypeStruct, None where there is none


@struct.dataclass
class LayerParams:
    """The weights of one block; a bias or norm that the architecture lacks is None."""

    attention_norm: Leaf  # [D]
    qkv: Leaf  # [K, G + 2, H, D], of each kv head its query heads, its key and its value
    qkv_bias: Leaf  # [K, G + 2, H]
    o: Leaf  # [D, N, H]
    q_norm: Leaf  # [H]
    k_norm: Leaf  # [H]
    ffn_norm: Leaf  # [D]
    gate_up: Leaf  # [2, F, D]
    down: Leaf  # [D, F]


@struct.dataclass
class DecoderParams:
    """The weights of a model. Layers are a tuple, not a stack: a scan over a stack copies each layer out of it."""

    embedding: Leaf  # [V, D]
    layers: tuple[LayerParams, ...]
    final_norm: Leaf  # [D]
    lm_head: Leaf  # [V, D], None: tied to the embedding


def param_specs(config: ModelConfig, dtype: str | None = None) -> DecoderParams:
    """The tree of `ParamSpec` of the model, in `dtype` or the checkpoint's own."""
    dtype = dtype or config.dtype
    hidden, vocab, ffn, head = config.hidden_size, config.vocab_size, config.ffn_size, config.head_dim

    def matrix(shape: tuple[int, ...], axes: tuple[str, ...], num_input_axes: int = 1) -> ParamSpec:
        return ParamSpec(shape, axes, dtype, num_input_axes=num_input_axes)

    def norm(size: int, axis: str) -> ParamSpec:
        return ParamSpec((size,), (axis,), dtype, init="ones")

    # One product, though it may be sharded: a device holds whole kv heads with all that belongs to them.
    heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, head)
    head_axes = ("kv_heads", "group", "head_dim")
    layer = LayerParams(
        attention_norm=norm(hidden, "embed"),
        qkv=matrix((*heads, hidden), (*head_axes, "embed")),
        qkv_bias=ParamSpec(heads, head_axes, dtype, init="zeros") if config.qkv_bias else None,
        o=matrix((hidden, config.num_heads, head), ("embed", "heads", "head_dim"), num_input_axes=2),
        q_norm=norm(head, "head_dim") if config.qk_norm else None,
        k_norm=norm(head, "head_dim") if config.qk_norm else None,
        ffn_norm=norm(hidden, "embed"),
        gate_up=matrix((2, ffn, hidden), ("gate_up", "ffn", "embed")),
        down=matrix((hidden, ffn), ("embed", "ffn")),
    )
    return DecoderParams(
        embedding=matrix((vocab, hidden), ("vocab", "embed")),
        layers=(layer,) * config.num_layers,
        final_norm=norm(hidden, "embed"),
        lm_head=None if config.tie_word_embeddings else matrix((vocab, hidden), ("vocab", "embed")),
    )


def forward(
    config: ModelConfig,
    params: DecoderParams,
    cache: KVCache,
    inputs: PrefillInputs | DecodeInputs,
    backend: AttentionBackend = BACKENDS["xla"],
) -> tuple[Array, KVCache]:
    """The hidden states [T, D] of the inputs' tokens, normalized, and the cache with their keys and values written."""
    with jax.named_scope("embedding"):
        hidden = params.embedding[inputs.token_ids]  # [T, D]
    with jax.named_scope("rope_table"):
        table = rope_table(config.rope, config.head_dim, inputs.positions)
    layers = []
    for index, (layer, pages) in enumerate(zip(params.layers, cache.layers, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            hidden, pages = decoder_layer(
                config, config.sliding_windows[index], backend, layer, pages, hidden, table, inputs
            )
            layers.append(pages)
    with jax.named_scope("final_norm"):
        return rms_norm(hidden, params.final_norm, config.norm_eps), KVCache(tuple(layers))


# Compiled as part of the whole step. The inner jit is there so that layers of one kind are traced and lowered
# once: of 28 layers in 14 programs, that is half a minute of Python.
@partial(jax.jit, static_argnums=(0, 1, 2))
def decoder_layer(
    config: ModelConfig,
    window: int | None,
    backend: AttentionBackend,
    layer: LayerParams,
    pages: Array,
    hidden: Array,
    table: tuple[Array, Array],
    inputs: PrefillInputs | DecodeInputs,
) -> tuple[Array, Array]:
    """hidden [T, D] -> [T, D] through one block, and the layer's pages with the keys and values written."""
    # Steps of prefill are the ones that may be differentiated, and have many rows: theirs are XLA's products.
    products = backend.products if isinstance(inputs, DecodeInputs) else PLAIN
    hidden, pages = attention_block(config, window, backend, products, layer, pages, hidden, table, inputs)
    return feed_forward(config, products, layer, hidden), pages


def attention_block(
    config: ModelConfig,
    window: int | None,
    backend: AttentionBackend,
    products: Products,
    layer: LayerParams,
    pages: Array,
    hidden: Array,
    table: tuple[Array, Array],
    inputs: PrefillInputs | DecodeInputs,
) -> tuple[Array, Array]:
    """hidden + output(attention(norm(hidden))), [T, D]: keys and values are written to their pages first, then read."""
    with jax.named_scope("qkv"):
        norm = (layer.attention_norm, config.norm_eps)
        qkv = products.linear(hidden, layer.qkv, layer.qkv_bias, norm=norm)  # [T, K, G + 2, H]
        if config.qk_norm:
            qkv = norm_queries_and_keys(config, layer, qkv)
        queries = qkv[:, :, :-2].reshape(-1, config.num_heads, config.head_dim)  # [T, N, H]
        keys, values = qkv[:, :, -2], qkv[:, :, -1]  # [T, K, H]
    with jax.named_scope("rope"):
        queries = rope(queries, table, config.rope.interleaved).astype(hidden.dtype)
        keys = rope(keys, table, config.rope.interleaved)  # rounded to the pages' dtype when written
    with jax.named_scope("cache_write"):
        pages = kv_cache.write(pages, keys, values, inputs.slots)
    with jax.named_scope("attention"):
        attended = attention(queries, pages, inputs, window, backend)
    with jax.named_scope("output"):
        return products.linear(attended, layer.o, residual=hidden, num_input_axes=2), pages


def norm_queries_and_keys(config: ModelConfig, layer: LayerParams, qkv: Array) -> Array:
    """qkv [T, K, G + 2, H], in float32, with each query and key head normalized.

    Where they lie, since a GPU would copy parts out first; and rounded once, after the rope that follows.
    """
    group = qkv.shape[2] - 2
    heads = jnp.arange(group + 2)[:, None]
    weights = jnp.where(heads < group, layer.q_norm, jnp.where(heads == group, layer.k_norm, 1))  # [G + 2, H]
    return rms_norm(qkv.astype(jnp.float32), weights, config.norm_eps, is_normed=heads <= group)


def feed_forward(config: ModelConfig, products: Products, layer: LayerParams, hidden: Array) -> Array:
    """hidden + down(activation(gate(norm(hidden))) * up(norm(hidden))), [T, D]."""
    with jax.named_scope("feed_forward"):
        norm = (layer.ffn_norm, config.norm_eps)
        activated = products.gated_linear(hidden, layer.gate_up, config.activation, norm=norm)
        return products.linear(activated, layer.down, residual=hidden)


def logits(params: DecoderParams, hidden: Array) -> Array:
    """Scores of the next token [T, V] float32 from normalized hidden states [T, D]."""
    with jax.named_scope("logits"):
        head = params.embedding if params.lm_head is None else params.lm_head
        return linear(hidden, head, output_dtype=jnp.float32)
