"""The costs of two published models, worked out by hand."""

import pytest

from miniinfer_jax.benchmark import roofline
from miniinfer_jax.benchmark.roofline import Ceilings, StepCost
from miniinfer_jax.config import ModelConfig


def qwen2(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int, tied: bool):
    return ModelConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn,
        max_position=32768,
        tie_word_embeddings=tied,
        qkv_bias=True,
    )


SMALL = qwen2(896, 24, 14, 2, 64, 4864, 151_936, tied=True)  # Qwen2.5-0.5B
LARGE = qwen2(3584, 28, 28, 4, 128, 18944, 152_064, tied=False)  # Qwen2.5-7B


def test_num_params_are_the_published_ones():
    # 0.5B, a layer: q and output 2 * 896 * 896 = 1,605,632; k and v 2 * 896 * 128 = 229,376;
    # gate, up, down 3 * 896 * 4864 = 13,074,432; biases 896 + 256 = 1,152; norms 1,792
    assert roofline.layer_params(SMALL) == 1_605_632 + 229_376 + 13_074_432 + 1_152 + 1_792 == 14_912_384
    # 24 layers, the last norm, one table of 151,936 * 896 = 136,134,656
    assert roofline.num_params(SMALL) == 24 * 14_912_384 + 896 + 136_134_656 == 494_032_768
    # 7B, a layer: 2 * 3584 * 3584 = 25,690,112; 2 * 3584 * 512 = 3,670,016; 3 * 3584 * 18944 = 203,685,888;
    # biases 3584 + 1024 = 4,608; norms 7,168. Two tables of 152,064 * 3584 = 544,997,376
    assert roofline.layer_params(LARGE) == 25_690_112 + 3_670_016 + 203_685_888 + 4_608 + 7_168 == 233_057_792
    assert roofline.num_params(LARGE) == 28 * 233_057_792 + 3584 + 2 * 544_997_376 == 7_615_616_512


def test_decode_of_the_small_model():
    cost = roofline.decode_cost(SMALL, [1024], weight_itemsize=2, kv_itemsize=2)
    assert cost.weight_bytes == 2 * (494_032_768 + 896)  # tied: the head reads the table; and one row of it
    assert cost.kv_bytes == 2 * 24 * (1024 + 1) * 256  # 2 kv heads * 64 * key and value = 256 numbers
    assert cost.logits_bytes == 2 * 4 * 151_936
    # matrices 24 * 14,909,440 + 136,134,656 = 493,961,216; attention 4 * 14 * 64 * 1024 a layer
    assert cost.operations == 2 * 493_961_216 + 24 * 3_670_016
    assert cost.num_bytes == cost.weight_bytes + cost.kv_bytes + cost.logits_bytes


def test_decode_of_the_large_model_in_a_batch():
    cost = roofline.decode_cost(LARGE, [1000] * 64, weight_itemsize=2, kv_itemsize=2)
    # untied: the table of embeddings gives 64 rows only
    assert cost.weight_bytes == 2 * (7_615_616_512 - 544_997_376 + 64 * 3584)
    assert cost.kv_bytes == 2 * 28 * 64 * 1001 * 1024
    # matrices 28 * 233,046,016 + 544,997,376 = 7,070,285,824
    assert cost.operations == 64 * (2 * 7_070_285_824 + 28 * 4 * 28 * 128 * 1000)
    # At 64 sequences reading is what takes time: 14.6 GB weights and 3.7 GB keys and values at 4 TB/s
    seconds = roofline.least_seconds(cost, Ceilings(4e12, 800e12))
    assert seconds == pytest.approx(cost.num_bytes / 4e12)
    assert 4.4e-3 < seconds < 4.6e-3


def test_prefill_of_the_small_model():
    cost = roofline.prefill_cost(SMALL, [3, 2], weight_itemsize=2, kv_itemsize=2)
    assert cost.weight_bytes == 2 * (494_032_768 + 5 * 896)
    assert cost.kv_bytes == 2 * (5 * 24 * 256) * 2
    pairs = (1 + 2 + 3) + (1 + 2)
    assert cost.operations == 2 * (5 * 24 * 14_909_440 + 2 * 136_134_656) + 24 * 4 * 14 * 64 * pairs


def test_a_sliding_window_bounds_what_is_read():
    windowed = ModelConfig(**{**vars(SMALL), "sliding_windows": (None,) * 12 + (100,) * 12})
    cost = roofline.decode_cost(windowed, [1024, 50], weight_itemsize=2, kv_itemsize=2)
    assert cost.kv_bytes == 2 * 256 * (12 * (1024 + 50) + 12 * (100 + 50) + 24 * 2)
    whole = roofline.prefill_cost(SMALL, [10], 2, 2).operations
    short = ModelConfig(**{**vars(SMALL), "sliding_windows": (4,) * 24})
    # 55 pairs; with a window of 4: 1 + 2 + 3 + 4 * 7 = 34
    assert whole - roofline.prefill_cost(short, [10], 2, 2).operations == 24 * 4 * 14 * 64 * (55 - 34)


def test_a_run_is_the_sum_of_its_steps():
    # Two sequences together, three decode steps each: exactly the steps at contexts 6, 7, 8 and 11, 12, 13
    run = roofline.decode_run_cost(SMALL, [(5, 4), (10, 4)], max_num_seqs=2, weight_itemsize=2, kv_itemsize=2)
    steps = StepCost()
    for step in range(3):
        steps += roofline.decode_cost(SMALL, [6 + step, 11 + step], weight_itemsize=2, kv_itemsize=2)
    assert run == steps


def test_a_run_in_a_small_batch_reads_the_weights_more_often():
    lengths = [(5, 11)] * 4
    wide = roofline.decode_run_cost(SMALL, lengths, 4, 2, 2)
    narrow = roofline.decode_run_cost(SMALL, lengths, 1, 2, 2)
    assert narrow.weight_bytes - wide.weight_bytes == 30 * 2 * 494_032_768
    assert (narrow.kv_bytes, narrow.operations) == (wide.kv_bytes, wide.operations)
