"""A folder's tokenizer and chat template load as data, without torch."""

import json
import subprocess
import sys
import textwrap

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from miniinfer_jax.tokenizer import TokenizerError, load_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """Bytes as tokens, the ChatML tokens as special ones, written as a checkpoint would hold them."""
    tokens = ["<|im_end|>", "<|im_start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:2])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
        "auto_map": {"AutoTokenizer": ["own_code.Own", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own_code.py").write_text("raise SystemExit('this code ran')")
    return tmp_path


def loaded(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def test_text_survives_and_special_tokens_are_skipped(folder):
    tokenizer = loaded(folder)
    text = "1+1=2, wörld <|im_end|>\n"
    token_ids = tokenizer.encode(text)
    assert tokenizer.eos_token_id == 0 and 0 in token_ids
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text.replace("<|im_end|>", "")


def test_chat_template(folder):
    tokenizer = loaded(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_in_a_file_of_its_own(folder):
    (folder / "chat_template.jinja").write_text("only this")
    assert loaded(folder).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "only this"


def test_neither_torch_nor_advice_about_it_nor_code_of_the_folder(folder):
    program = """
        import sys
        from pathlib import Path
        from miniinfer_jax.tokenizer import load_tokenizer
        tokenizer = load_tokenizer(Path(sys.argv[1]))
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
        assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
        assert not {"torch", "own_code", "transformers.modeling_utils"} & set(sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "PyTorch" not in ran.stderr


def test_no_tokenizer_files_is_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_another_format_says_how_to_convert(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match="vocab.json but no tokenizer.json.*save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_refused(folder, name):
    (folder / name).write_text('{"version": ')
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(folder)
