"""config.json -> ModelConfig: as transformers reads it, and refused by name where it cannot be honoured."""

import pytest

from miniinfer_jax.config import ConfigError
from miniinfer_jax.models import FAMILIES, config_from_hf, family

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **SIZES}


def test_families_differ_in_bias_norm_and_default_head_dim():
    qwen2, qwen3 = config_from_hf(QWEN2), config_from_hf(QWEN3)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, 16)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


def test_every_family_has_what_the_loader_asks_for():
    for architecture in FAMILIES:
        module = family(architecture)
        assert module.WEIGHT_MAP and callable(module.config_from_hf) and module.UNREAD_WEIGHTS is not None


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for hf, reference_class in ((QWEN2, transformers.Qwen2Config), (QWEN3, transformers.Qwen3Config)):
        config, reference = config_from_hf(hf), reference_class(**SIZES)
        assert config.norm_eps == reference.rms_norm_eps
        assert config.activation == reference.hidden_act
        assert config.tie_word_embeddings == reference.tie_word_embeddings
        assert config.rope.theta == reference.rope_parameters["rope_theta"]
        assert config.rope.scaling == reference.rope_parameters["rope_type"]
        assert config.eos_token_ids == () and reference.eos_token_id is None
        if hasattr(reference, "head_dim"):
            assert config.head_dim == reference.head_dim


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ],
)
def test_windows_are_those_of_transformers(change):
    transformers = pytest.importorskip("transformers")
    reference = transformers.Qwen2Config(**SIZES, **change)
    expected = tuple(
        reference.sliding_window if layer_type == "sliding_attention" else None for layer_type in reference.layer_types
    )
    assert config_from_hf({**QWEN2, **change}).sliding_windows == expected


ROPES = [
    {},
    {"rope_theta": 1e6},
    {"rope_theta": 5e5, "rope_scaling": None},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_theta": 3e4, "rope_parameters": {"rope_type": "linear", "factor": 3}},
    {"rope_theta": 3e4, "rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 7e4}},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
]


@pytest.mark.parametrize("change", ROPES)
def test_rope_is_that_of_transformers(change):
    transformers = pytest.importorskip("transformers")
    expected = transformers.Qwen2Config(**SIZES, **change).rope_parameters
    rope = config_from_hf({**QWEN2, **change}).rope
    assert (rope.theta, rope.scaling) == (expected["rope_theta"], expected["rope_type"])
    assert rope.factor == expected.get("factor", 1.0)
    assert rope.original_max_position == expected.get("original_max_position_embeddings", 0)
    if rope.scaling == "llama3":
        assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)


def test_yarn_attention_factor_from_mscales():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}
    yarn["mscale_all_dim"] = 0.7
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](transformers.Qwen3Config(**SIZES, rope_parameters=dict(yarn)))
    rope = config_from_hf({**QWEN2, "rope_parameters": yarn}).rope
    assert rope.attention_factor == pytest.approx(expected)
    given = config_from_hf({**QWEN2, "rope_parameters": {**yarn, "attention_factor": 1.5, "beta_fast": 16}}).rope
    assert (given.attention_factor, given.beta_fast, given.beta_slow) == (1.5, 16.0, 1.0)


@pytest.mark.parametrize(("given", "expected"), [(7, (7,)), ([7, 3, 7], (7, 3)), (None, ()), ([95, 96], (95,))])
def test_eos_token_ids(given, expected):
    assert config_from_hf({**QWEN2, "eos_token_id": given}).eos_token_ids == expected


def test_values_are_carried_over():
    hf = {**QWEN2, "head_dim": 32, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-5}
    config = config_from_hf({**hf, "torch_dtype": "bfloat16", "num_key_value_heads": None, "auto_map": {"A": "b.C"}})
    assert (config.head_dim, config.tie_word_embeddings, config.activation) == (32, True, "gelu_tanh")
    assert (config.norm_eps, config.dtype, config.num_kv_heads) == (1e-5, "bfloat16", 4)
    assert config_from_hf({**hf, "dtype": "float16", "torch_dtype": "float32"}).dtype == "float16"
    assert config_from_hf(hf).dtype == "float32"


def test_model_type_decides_where_architectures_is_absent():
    assert config_from_hf({**SIZES, "model_type": "qwen3"}).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("key", [*SIZES])
def test_a_missing_size_is_named(key):
    hf = {name: value for name, value in QWEN2.items() if name != key}
    with pytest.raises(ConfigError, match=f"config.json lacks '{key}'"):
        config_from_hf(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'.*Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "'mamba'.*Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": None}, "lacks 'architectures'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq"),
        ({"is_causal": False}, "is_causal"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "64"}, "'hidden_size': '64'"),
        ({"hidden_size": 65}, "head_dim"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"num_hidden_layers": True}, "'num_hidden_layers': True"),
        ({"hidden_act": "mish"}, "'mish'.*silu"),
        ({"torch_dtype": "float64"}, "float64"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 4.0}}, "contradicts"),
        ({"rope_scaling": "linear"}, "must be objects"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"layer_types": ["full_attention"] * 3}, "3 entries for 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**QWEN2, **change})


def test_qwen3_attention_bias_is_refused():
    with pytest.raises(ConfigError, match="attention_bias"):
        config_from_hf({**QWEN3, "attention_bias": True})
