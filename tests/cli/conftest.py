"""A random model of a hundred thousand weights, with a tokenizer of bytes."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from miniinfer_jax.benchmark.shapes import write_shape

SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def write_tokenizer(folder: Path) -> None:
    alphabet = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shape("tiny", tmp_path_factory.mktemp("tiny"))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def llm(tiny_model: Path):
    from miniinfer_jax import LLM

    return LLM(
        tiny_model,
        load_format="dummy",
        max_num_seqs=2,
        max_num_batched_tokens=16,
        max_model_len=128,
        num_pages=16,
        use_tqdm=False,
    )
