"""The tokenizer of the demo models: byte-level BPE trained on the demo corpus, and its files.

Digits and capital letters that start no word are single tokens and take no leading space with them, so that
numbers and letter strings look the same wherever they stand. Any text encodes to bytes and back unchanged.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import demo_corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 1024
MAX_LENGTH = 1024
SPECIAL_TOKENS = (demo_corpus.END_OF_TEXT, demo_corpus.TURN_START, demo_corpus.TURN_END)
# A word with its space, a digit, a capital letter, a run of other signs with its space, or white space.
PIECES = r" ?[A-Z]?[a-z]+|\d|[A-Z]| ?[^\sA-Za-z\d]+|\s"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(seed: int, num_documents: int = 20_000) -> Tokenizer:
    """Trains the vocabulary on `num_documents` of the corpus; the same for the same seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer {seed}")
    texts = [demo_corpus.training_document(rng).text for _ in range(num_documents)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json (without indentation, for size) and tokenizer_config.json into `folder`."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "eos_token": demo_corpus.TURN_END,
        "pad_token": demo_corpus.END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
