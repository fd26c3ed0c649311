"""Damaged, missing, pickled: each is refused with the file's name. Reading stays within its memory."""

import json
import os
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from miniinfer_jax.weights import CheckpointError
from miniinfer_jax.weights.safetensors_folder import INDEX_FILE, SINGLE_FILE, read_headers, read_tensor

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4).astype(ml_dtypes.bfloat16)}


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_headers_and_tensors_of_one_file(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    headers = read_headers(tmp_path)
    assert {name: (header.shape, header.dtype) for name, header in headers.items()} == {
        "a": ((2, 3), "F32"),
        "b": ((4,), "BF16"),
    }
    for name, expected in TENSORS.items():
        read = read_tensor(name, headers[name])
        assert read.dtype == expected.dtype and np.array_equal(read, expected)


def test_headers_and_tensors_of_shards(sharded):
    headers = read_headers(sharded)
    assert headers["b"].file.name == "two.safetensors"
    assert np.array_equal(read_tensor("a", headers["a"]), TENSORS["a"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_way_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=f"{name}.*save_pretrained"):
        read_headers(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=f"neither {SINGLE_FILE} nor {INDEX_FILE}"):
        read_headers(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 4, 40, -1])
def test_a_truncated_file_is_named(tmp_path, num_bytes):
    path = tmp_path / SINGLE_FILE
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE} is not a whole safetensors file"):
        read_headers(tmp_path)


def test_garbage_is_named(tmp_path):
    (tmp_path / SINGLE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
    with pytest.raises(CheckpointError, match="model.safetensors is not a whole"):
        read_headers(tmp_path)


def test_missing_shards_are_named(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks two.safetensors"):
        read_headers(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, "do not hold: b"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "do not hold: c"),
        ({"c": "one.safetensors", "b": "two.safetensors"}, "'a'.*does not name it"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "'a'.*expects it in two.safetensors"),
        ({"a": "../one.safetensors"}, "must be the name of a file in the folder"),
        ({"a": 1}, "must be the name of a file in the folder"),
        ({}, "lacks 'weight_map'"),
        ([], "lacks 'weight_map'"),
    ],
)
def test_an_index_that_its_files_contradict(sharded, weight_map, message):
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_headers(sharded)


LOAD_AND_MEASURE = """
    import sys
    from pathlib import Path
    import jax
    from miniinfer_jax.models.decoder import param_specs
    from miniinfer_jax.params import num_bytes
    from miniinfer_jax.weights import load_params, read_model_config

    def memory(field):
        status = Path("/proc/self/status").read_text().split(field + ":")[1]
        return int(status.split()[0]) * 1024

    folder, dtype = Path(sys.argv[1]), sys.argv[2]
    jax.block_until_ready(jax.device_put(0.0))
    config = read_model_config(folder)
    specs = param_specs(config, dtype)
    before = memory("VmRSS")
    params = load_params(folder, config, specs)
    assert "torch" not in sys.modules
    print(memory("VmHWM") - before, num_bytes(specs))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_stays_within_what_is_kept_and_the_largest_tensor(tmp_path, dtype):
    num_layers, hidden, ffn, vocab = 2, 512, 1024, 65536
    hf_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 64,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    layer = {f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
    layer |= {f"self_attn.{part}_proj.bias": (hidden,) for part in "qkv"}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    layer |= {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)}
    layer |= {"mlp.down_proj.weight": (hidden, ffn)}
    shapes = {f"model.layers.{index}.{name}": shape for index in range(num_layers) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes |= {"lm_head.weight": (vocab, hidden)}  # the largest comes last, when everything else is already there
    save_file({name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}, tmp_path / SINGLE_FILE)
    command = [sys.executable, "-c", textwrap.dedent(LOAD_AND_MEASURE), str(tmp_path), dtype]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    grown, kept = map(int, ran.stdout.split())
    largest = vocab * hidden * 2
    allowance = 30 * 2**20  # of the 200 MB that a model of any size may take beside
    assert grown <= kept + largest + allowance, f"grew by {grown >> 20} MiB for {kept >> 20} MiB of weights"
