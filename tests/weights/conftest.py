"""Small checkpoints that transformers itself wrote, one a kind, made once a session."""

import pytest

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def write_checkpoint(tmp_path_factory):
    """write(family, dtype, tied, max_shard_size) -> (folder, the torch model whose weights are in it)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kinds = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }

    def write(family="qwen2", dtype="float32", tied=False, max_shard_size="1GB"):
        config_class, model_class = kinds[family]
        torch.manual_seed(0)
        head_dim = {"head_dim": 16} if family == "qwen3" else {}
        model = model_class(config_class(**SIZES, **head_dim, tie_word_embeddings=tied, eos_token_id=3))
        for parameter in model.parameters():  # biases and norms start as constants, which would hide a mix-up
            torch.nn.init.normal_(parameter)
        model = model.to(getattr(torch, dtype))
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder, model

    return write
