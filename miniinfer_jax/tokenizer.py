"""Loads the tokenizer of a model folder, as data and without importing torch."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
OTHER_FORMATS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json")


class TokenizerError(ValueError):
    """Tokenizer files that cannot be used; says which, and how to convert them."""


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast | None":
    """The tokenizer and chat template that the folder's `tokenizer.json` holds; None if it has no tokenizer files.

    Raises TokenizerError for damaged files, and for a tokenizer in another format only.
    """
    if not (folder / TOKENIZER_FILE).exists():
        others = [name for name in OTHER_FORMATS if (folder / name).exists()]
        if not others:
            return None
        raise TokenizerError(
            f"{folder} has {', '.join(others)} but no {TOKENIZER_FILE}; write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), or set skip_tokenizer_init=True"
        )
    return _load_fast(folder)


def _load_fast(folder: Path) -> "PreTrainedTokenizerFast":
    # transformers advises on import to install torch, which nothing here needs.
    logging.getLogger("transformers").addFilter(_is_no_torch_advice)
    # Not AutoTokenizer: it imports every model's configuration, torch with them where it is installed, and takes 2 s
    # more; and it would rebuild the rules of known families, where tokenizer.json itself says what they are.
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust tokenizers raise Exception itself for a damaged file
        raise TokenizerError(f"the tokenizer files in {folder} cannot be read: {error}") from error


def _is_no_torch_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()
