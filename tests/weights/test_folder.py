"""Where a model is found, what is downloaded, and what its JSON files may say."""

import json
import sys

import huggingface_hub
import pytest

from miniinfer_jax.weights import CheckpointError, read_config, read_model_config, resolve


def test_a_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_shipped_models_lie_in_the_package():
    assert resolve("demo").parts[-2:] == ("miniinfer_jax", "demo")
    assert resolve("demo-draft").parts[-3:] == ("miniinfer_jax", "demo", "draft")


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for name in (str(tmp_path / "absent"), "./absent", "../absent", "a/b/c", ""):
        with pytest.raises(CheckpointError, match="does not exist"):
            resolve(name)


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve(file)


def test_a_revision_needs_a_hub_id(tmp_path):
    for model in (tmp_path, "demo"):
        with pytest.raises(CheckpointError, match="revision 'main'.*is no hub id"):
            resolve(model, revision="main")


def test_a_hub_id_is_downloaded_at_its_revision_and_only_its_data(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("some-one/some-model", revision="v2") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("some-one/some-model", "v2")
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    others = [
        "pytorch_model.bin",
        "modeling_own.py",
        "consolidated.safetensors",
        "original/config.json",
        "a/b.safetensors",
    ]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files + others, **patterns)) == files


def test_what_the_hub_refuses_says_what_was_tried(monkeypatch):
    def snapshot_download(repository, **options):
        raise FileNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="(?s)'no-one/nothing' is not a folder.*at revision 'v1'.*disabled.*demo"):
        resolve("no-one/nothing", revision="v1")


def test_an_impossible_hub_id_is_refused():
    with pytest.raises(CheckpointError, match="no hub id at all"):
        resolve("no hub id at all")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json cannot be read as JSON"):
        read_config(tmp_path)


def test_a_missing_config_and_one_that_is_no_object(tmp_path):
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object, not list"):
        read_config(tmp_path)


def test_end_of_sequence_ids_of_both_files_hold_and_no_code_is_run(tmp_path):
    hf_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8,
        "eos_token_id": 5,
        "auto_map": {"AutoConfig": "own_code.Config"},
    }
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    (tmp_path / "own_code.py").write_text("raise SystemExit('this code ran')")
    assert read_model_config(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 5]}')
    assert read_model_config(tmp_path).eos_token_ids == (5, 6)
    assert "own_code" not in sys.modules
