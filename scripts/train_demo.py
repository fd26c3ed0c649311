"""Trains the demo model and its draft on the synthetic corpus, through the engine's own forward.

    python scripts/train_demo.py --out miniinfer_jax/demo

writes the model to the folder and the draft to its subfolder `draft`, both in Hugging Face's layout. The draft
learns the model's own distribution. On a GPU this takes minutes; on a CPU try `--steps 20 --draft-steps 20
--batch-tokens 2048`. With `--time-budget` the schedule ends in time on any machine. Then measure it:
`python scripts/eval_demo.py --model miniinfer_jax/demo`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import demo_corpus
import demo_tokenizer
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from miniinfer_jax import batch, kv_cache, models, params
from miniinfer_jax.config import ModelConfig
from miniinfer_jax.models import decoder
from miniinfer_jax.weights import save_params

PAGE_SIZE = 16
STEPS_A_CHUNK = 8
STEPS_AHEAD = 8  # how many steps the host may run ahead of the device: the clock then says where training stands
LOG_EVERY = 200
WARMUP_STEPS = 300
LONG_ROWS_FROM = 0.9  # of the schedule; from here on four rows in one, so that long conversations work too
MAX_MODEL_BYTES, MAX_DRAFT_BYTES = 7_100_000, 950_000


class Size(NamedTuple):
    """What differs between the model and its draft."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


MODEL_SIZE = Size(hidden=256, layers=5, heads=4, kv_heads=2, ffn=576)
DRAFT_SIZE = Size(hidden=128, layers=2, heads=2, kv_heads=1, ffn=256)


def hf_config(size: Size) -> dict[str, Any]:
    """The config.json of a Qwen2 model."""
    end_of_text, _, turn_end = range(3)  # the order of demo_tokenizer.SPECIAL_TOKENS
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": demo_tokenizer.VOCABULARY_SIZE,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": demo_tokenizer.MAX_LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": turn_end,
        "pad_token_id": end_of_text,
    }


# ---------------------------------------------------------------- batches, made by other processes


@functools.cache
def _tokenizer_of(text: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process a core already
    return Tokenizer.from_str(text)


def packed_rows(tokenizer_text: str, seed: str, num_rows: int, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole documents packed into rows: token ids [num_rows, row_length] and their loss weights (0 for padding)."""
    tokenizer, rng = _tokenizer_of(tokenizer_text), random.Random(seed)
    token_ids = np.zeros((num_rows, row_length), np.uint16)  # 0 is <|endoftext|>
    weights = np.zeros((num_rows, row_length), np.float32)
    row, used = 0, 0
    while True:
        documents = [demo_corpus.training_document(rng) for _ in range(64)]
        segments = [segment for document in documents for segment in document.segments]
        encodings = iter(tokenizer.encode_batch([text for text, _ in segments]))
        for document in documents:
            ids: list[int] = []
            values: list[float] = []
            for _, weight in document.segments:
                segment_ids = next(encodings).ids
                ids += segment_ids
                values += [weight] * len(segment_ids)
            ids, values = ids[:row_length], values[:row_length]
            if used + len(ids) > row_length:
                row, used = row + 1, 0
                if row == num_rows:
                    return token_ids, weights
            token_ids[row, used : used + len(ids)] = ids
            weights[row, used : used + len(ids)] = values
            used += len(ids)


def batches(
    pool: ProcessPoolExecutor, tokenizer: Tokenizer, seed: str, num_rows: int, row_length: int, ahead: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Fresh batches without end, the same for the same seed however many processes make them."""
    text = tokenizer.to_str()

    def submit(index: int) -> Any:
        return pool.submit(packed_rows, text, f"{seed} {index}", num_rows * STEPS_A_CHUNK, row_length)

    waiting = deque(submit(index) for index in range(ahead))
    next_index = ahead
    while True:
        token_ids, weights = waiting.popleft().result()
        waiting.append(submit(next_index))
        next_index += 1
        for start in range(0, len(token_ids), num_rows):
            yield token_ids[start : start + num_rows], weights[start : start + num_rows]


# ---------------------------------------------------------------- the loss and the step


def forward_logits(config: ModelConfig, weights: params.Tree, token_ids: jax.Array) -> jax.Array:
    """The engine's forward over fresh rows [B, L]: logits [B, L, V] in float32."""
    num_rows, row_length = token_ids.shape
    num_pages = num_rows * -(-row_length // PAGE_SIZE)
    dtype = jax.tree.leaves(weights)[0].dtype.name
    cache = kv_cache.create(config, num_pages, PAGE_SIZE, dtype)
    hidden, _ = decoder.forward(config, weights, cache, batch.fresh_inputs(token_ids, PAGE_SIZE))
    return decoder.logits(weights, hidden).reshape(num_rows, row_length, -1)


class Teacher(NamedTuple):
    """A trained model whose distribution another one learns."""

    config: ModelConfig
    weights: params.Tree


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which the schedule multiplies in at each step."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda array: array.ndim > 1, tree)),
    )


def weighted_loss(
    config: ModelConfig,
    weights: params.Tree,
    token_ids: jax.Array,
    token_weights: jax.Array,
    teacher: Teacher | None,
    dtype: str,
) -> jax.Array:
    """The mean cross-entropy of the next token, or against the teacher's distribution, by token weight."""
    weights = jax.tree.map(lambda array: array.astype(dtype), weights)
    log_probs = jax.nn.log_softmax(forward_logits(config, weights, token_ids)[:, :-1])  # [B, L - 1, V]
    if teacher is None:
        losses = -jnp.take_along_axis(log_probs, token_ids[:, 1:, None], axis=-1)[..., 0]
    else:
        targets = jax.nn.softmax(forward_logits(teacher.config, teacher.weights, token_ids)[:, :-1])
        losses = -jnp.sum(jax.lax.stop_gradient(targets) * log_probs, axis=-1)
    return jnp.sum(losses * token_weights[:, 1:]) / jnp.sum(token_weights[:, 1:])


@functools.partial(jax.jit, static_argnames=("config", "teacher_config", "dtype"), donate_argnames=("weights", "state"))
def train_step(
    weights: params.Tree,
    state: optax.OptState,
    teacher_weights: params.Tree | None,
    token_ids: jax.Array,
    token_weights: jax.Array,
    learning_rate: jax.Array,
    *,
    config: ModelConfig,
    teacher_config: ModelConfig | None,
    dtype: str,
) -> tuple[params.Tree, optax.OptState, jax.Array]:
    """One step of AdamW: the new weights, the new optimizer state and the loss before the step."""
    teacher = None if teacher_config is None else Teacher(teacher_config, teacher_weights)
    token_ids = token_ids.astype(jnp.int32)
    loss, gradients = jax.value_and_grad(
        lambda tree: weighted_loss(config, tree, token_ids, token_weights, teacher, dtype)
    )(weights)
    updates, state = optimizer().update(gradients, state, weights)
    weights = jax.tree.map(lambda array, update: array - learning_rate * update, weights, updates)
    return weights, state, loss


class Schedule(NamedTuple):
    """When training ends: after `steps`, or after `seconds` if that is earlier."""

    steps: int
    seconds: float
    peak_learning_rate: float

    def learning_rate(self, step: int, progress: float) -> np.float32:
        """A linear warm-up, then half a cosine from the peak to a hundredth of it; `progress` runs from 0 to 1."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        warm_up = min(1.0, (step + 1) / min(WARMUP_STEPS, 1 + self.steps // 20))
        return np.float32(self.peak_learning_rate * warm_up * (0.01 + 0.99 * cosine))


def train(
    name: str,
    config: ModelConfig,
    rows: Iterator[tuple[np.ndarray, np.ndarray]],
    schedule: Schedule,
    seed: int,
    dtype: str,
    teacher: Teacher | None = None,
) -> params.Tree:
    """Trains random weights to the end of the schedule; gives them back in the config's own dtype."""
    weights = params.random_init(decoder.param_specs(config), jax.random.key(seed))
    weights = jax.tree.map(lambda array: array.astype(jnp.float32), weights)
    state = optimizer().init(weights)
    started, step, progress, num_tokens = time.perf_counter(), 0, 0.0, 0
    losses: deque[jax.Array] = deque(maxlen=STEPS_AHEAD)
    while progress < 1.0:
        token_ids, token_weights = next(rows)
        if progress >= LONG_ROWS_FROM:
            long_shape = (len(token_ids) // 4, token_ids.shape[1] * 4)
            token_ids, token_weights = token_ids.reshape(long_shape), token_weights.reshape(long_shape)
        learning_rate = schedule.learning_rate(step, progress)
        weights, state, loss = train_step(
            weights,
            state,
            None if teacher is None else teacher.weights,
            token_ids,
            token_weights,
            learning_rate,
            config=config,
            teacher_config=None if teacher is None else teacher.config,
            dtype=dtype,
        )
        if len(losses) == STEPS_AHEAD:
            losses[0].block_until_ready()
        losses.append(loss)
        step += 1
        num_tokens += token_ids.size
        progress = max(step / schedule.steps, (time.perf_counter() - started) / schedule.seconds)
        if step % LOG_EVERY == 0 or step <= 3 or progress >= 1.0:
            value, seconds = float(loss), time.perf_counter() - started
            print(
                f"{name} step {step} loss {value:.4f} lr {learning_rate:.2e} {seconds:.0f} s {num_tokens:,} tokens",
                flush=True,
            )
    return jax.tree.map(lambda array: array.astype(config.dtype), weights)


# ---------------------------------------------------------------- the files


def save_model(
    folder: Path, settings: dict[str, Any], weights: decoder.DecoderParams, tokenizer: Tokenizer, max_bytes: int
) -> None:
    """Writes the five files of a model; raises ValueError if they take more than `max_bytes`."""
    save_params(folder, weights, decoder.param_specs(models.config_from_hf(settings)), settings)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
    demo_tokenizer.save_tokenizer(tokenizer, folder)
    generation = {
        "eos_token_id": [settings["eos_token_id"], settings["pad_token_id"]],
        "pad_token_id": settings["pad_token_id"],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"{folder}: {num_bytes:,} bytes", flush=True)
    if num_bytes > max_bytes:
        raise ValueError(f"{folder} takes {num_bytes:,} bytes, more than {max_bytes:,}: make the model smaller")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("miniinfer_jax/demo"), help="the folder to write to")
    parser.add_argument("--steps", type=int, default=20_000, help="most steps of the model")
    parser.add_argument("--draft-steps", type=int, default=8_000, help="most steps of the draft")
    parser.add_argument("--time-budget", type=float, default=float("inf"), help="seconds that all of it may take")
    parser.add_argument("--draft-share", type=float, default=0.2, help="part of the time budget for the draft")
    parser.add_argument("--batch-tokens", type=int, default=32_768, help="tokens a step")
    parser.add_argument("--row-length", type=int, default=256, help="tokens a row of packed documents")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak for the model")
    parser.add_argument("--draft-learning-rate", type=float, default=3e-3, help="peak for the draft")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the forward; the weights are float32")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    started = time.perf_counter()
    arguments = parse_arguments()
    num_rows = arguments.batch_tokens // arguments.row_length
    if num_rows < 4 or num_rows % 4:
        raise ValueError(f"--batch-tokens must be a multiple of 4 x --row-length ({4 * arguments.row_length})")
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    tokenizer = demo_tokenizer.build_tokenizer(arguments.seed)
    teacher = None
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=spawning) as pool:
        rows = batches(
            pool, tokenizer, f"train {arguments.seed}", num_rows, arguments.row_length, 2 * arguments.workers
        )
        for name, size, steps, share, peak, max_bytes in (
            ("model", MODEL_SIZE, arguments.steps, 1 - arguments.draft_share, arguments.learning_rate, MAX_MODEL_BYTES),
            ("draft", DRAFT_SIZE, arguments.draft_steps, 1.0, arguments.draft_learning_rate, MAX_DRAFT_BYTES),
        ):
            settings = hf_config(size)
            config = models.config_from_hf(settings)
            seconds = share * (arguments.time_budget - (time.perf_counter() - started))
            schedule = Schedule(steps, seconds, peak)
            weights = train(name, config, rows, schedule, arguments.seed, dtype, teacher)
            folder = arguments.out if teacher is None else arguments.out / "draft"
            save_model(folder, settings, weights, tokenizer, max_bytes)
            teacher = Teacher(config, weights)
        pool.shutdown(cancel_futures=True)
    print(f"done in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
