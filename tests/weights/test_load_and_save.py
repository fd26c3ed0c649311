"""Checkpoints of transformers load weight for weight, what is saved loads again, what does not fit is named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from miniinfer_jax.config import ConfigError
from miniinfer_jax.models import config_from_hf
from miniinfer_jax.models.decoder import param_specs
from miniinfer_jax.params import map_specs
from miniinfer_jax.weights import CheckpointError, load_params, read_config, read_model_config, save_params
from miniinfer_jax.weights.places import leaves_by_path

HF_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


def load(folder, dtype=None):
    config = read_model_config(folder)
    return config, load_params(folder, config, param_specs(config, dtype))


def random_params(specs):
    generator = np.random.default_rng(0)
    return map_specs(lambda spec: generator.standard_normal(spec.shape).astype(spec.dtype), specs)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with random weights, written by save_params: (folder, the tensors as in the file)."""
    specs = param_specs(config_from_hf(HF_CONFIG))
    save_params(tmp_path, random_params(specs), specs, HF_CONFIG)
    return tmp_path, load_file(tmp_path / "model.safetensors")


def expected_leaves(model, config, dtype):
    """Path -> array of the torch model's own weights, mapped by hand and not by the family's WEIGHT_MAP."""
    torch = pytest.importorskip("torch")
    state = {name: value.to(getattr(torch, dtype)).float().numpy() for name, value in model.state_dict().items()}
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

    def grouped(block, kind, tail):
        """Of each kv head its query heads, its key, its value."""
        q, k, v = (block[f"self_attn.{part}_proj.{kind}"].reshape(kv_heads, -1, *tail) for part in "qkv")
        return np.concatenate([q, k, v], axis=1)

    expected = {"embedding": state["model.embed_tokens.weight"], "final_norm": state["model.norm.weight"]}
    if not config.tie_word_embeddings:
        expected["lm_head"] = state["lm_head.weight"]
    for layer in range(config.num_layers):
        block = {
            name.split(f"model.layers.{layer}.")[1]: value for name, value in state.items() if f".{layer}." in name
        }
        leaves = {
            "attention_norm": block["input_layernorm.weight"],
            "ffn_norm": block["post_attention_layernorm.weight"],
            "qkv": grouped(block, "weight", (head_dim, config.hidden_size)),
            "o": block["self_attn.o_proj.weight"].reshape(-1, heads, head_dim),
            "gate_up": np.stack([block["mlp.gate_proj.weight"], block["mlp.up_proj.weight"]]),
            "down": block["mlp.down_proj.weight"],
        }
        if config.qkv_bias:
            leaves["qkv_bias"] = grouped(block, "bias", (head_dim,))
        if config.qk_norm:
            leaves |= {f"{part}_norm": block[f"self_attn.{part}_norm.weight"] for part in "qk"}
        expected |= {f"layers.{layer}.{name}": value for name, value in leaves.items()}
    return expected


@pytest.mark.parametrize(
    ("family", "stored", "wanted", "tied", "max_shard_size"),
    [
        ("qwen2", "float32", "float32", False, "1GB"),
        ("qwen2", "bfloat16", "bfloat16", True, "1GB"),
        ("qwen2", "float32", "bfloat16", False, "20KB"),
        ("qwen2", "float16", "float32", True, "1GB"),
        ("qwen3", "bfloat16", "float32", False, "20KB"),
        ("qwen3", "float32", "float16", True, "1GB"),
        ("qwen3", "float16", "float16", False, "1GB"),
    ],
)
def test_loads_what_transformers_saved(write_checkpoint, family, stored, wanted, tied, max_shard_size):
    folder, model = write_checkpoint(family, stored, tied, max_shard_size)
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    config, params = load(folder, wanted)
    assert (config.dtype, config.tie_word_embeddings, config.eos_token_ids) == (stored, tied, (3,))
    expected, leaves = expected_leaves(model, config, wanted), leaves_by_path(params)
    assert set(leaves) == set(expected)
    for path, leaf in leaves.items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.dtype(wanted)
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), expected[path], err_msg=path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_transformers_loads_what_is_saved(write_checkpoint, tmp_path, family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, model = write_checkpoint(family, "bfloat16", True)
    config, params = load(folder)
    save_params(tmp_path, params, param_specs(config), read_config(folder))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_saving_and_loading_returns_the_same(checkpoint):
    folder, tensors = checkpoint
    config, params = load(folder)
    save_params(folder / "again", params, param_specs(config), HF_CONFIG)
    again = load_file(folder / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)


def test_save_refuses_another_model(tmp_path):
    config = config_from_hf(HF_CONFIG)
    specs = param_specs(config)
    params = random_params(specs)
    other = {**HF_CONFIG, "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
    with pytest.raises(CheckpointError, match="layers.0.qkv_bias"):
        save_params(tmp_path, params, specs, other)
    with pytest.raises(CheckpointError, match="embedding"):
        save_params(tmp_path, params, param_specs(dataclasses.replace(config, vocab_size=97)), HF_CONFIG)
    assert not list(tmp_path.iterdir())


def test_dummy_reads_nothing_and_depends_on_the_seed(tmp_path):
    config = config_from_hf(HF_CONFIG)
    specs = {"qkv": param_specs(config).layers[0].qkv}  # one shape compiles sooner than all
    first, same, other = (load_params(tmp_path / "absent", config, specs, "dummy", seed) for seed in (0, 0, 1))
    assert jnp.array_equal(first["qkv"], same["qkv"])
    assert not jnp.array_equal(first["qkv"], other["qkv"])


def test_unknown_load_format_lists_the_known(tmp_path):
    config = config_from_hf(HF_CONFIG)
    with pytest.raises(ConfigError, match="'pickle'.*auto, safetensors, dummy"):
        load_params(tmp_path, config, param_specs(config), "pickle")


def test_every_problem_is_named_at_once(checkpoint):
    folder, tensors = checkpoint
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 31), np.float32)
    tensors["model.norm.weight"] = np.zeros(32, np.int8)
    tensors["model.layers.2.input_layernorm.weight"] = np.zeros(32, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    for line in (
        "missing: model.layers.1.mlp.up_proj.weight",
        "wrong shape: model.layers.0.self_attn.q_proj.weight is [32, 31], expected [32, 32]",
        "wrong dtype: model.norm.weight is I8",
        "left over: model.layers.2.input_layernorm.weight",
    ):
        assert line in str(raised.value)


def test_a_wrong_config_gives_a_message_of_bounded_length(checkpoint):
    folder, _ = checkpoint
    config = config_from_hf({**HF_CONFIG, "num_hidden_layers": 200})
    with pytest.raises(CheckpointError, match="and 2326 more"):
        load_params(folder, config, param_specs(config))


def test_a_transposed_weight_of_the_same_size_is_refused(checkpoint):
    folder, tensors = checkpoint
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, name: np.ascontiguousarray(tensors[name].T)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is \[48, 32\], expected \[32, 48\]"):
        load(folder)


def test_harmless_extras_are_left_unread_and_only_they(checkpoint):
    folder, tensors = checkpoint
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    load(folder)
    tied = {**HF_CONFIG, "tie_word_embeddings": True}  # lm_head.weight stays in the file
    (folder / "config.json").write_text(json.dumps(tied))
    _, params = load(folder)
    assert params.lm_head is None
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    with pytest.raises(CheckpointError, match="missing: lm_head.weight"):
        load(folder)
