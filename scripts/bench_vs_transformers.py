"""MiniInfer against transformers' `generate` on this machine's CPU, in the same run; prints one JSON document.

Both run the same float32 weights, greedily, on all cores, past the end of sequence, so that both draw the same number
of tokens; only tokens that were asked for count. transformers gets padded batches, of 16 or 64, whichever is faster
for it, and runs each until its longest request is done. Compiling and warming up are timed apart.

    python scripts/bench_vs_transformers.py            # needs the extra `parity`
"""

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.cli import run
from miniinfer_jax.weights.folder import resolve

RAGGED_BATCH_SIZES = (16, 64)


@dataclass(frozen=True)
class Case:
    """Requests that are handed in together: prompts as token ids, and tokens to generate for each."""

    name: str
    goal: float  # our rate over transformers'
    prompts: list[list[int]]
    output_lens: list[int]
    batch_sizes: tuple[int, ...]  # that transformers may choose from


def make_cases(vocab_size: int) -> list[Case]:
    """Random prompts from seed 0: one, 16 of equal length, and 64 of ragged lengths in and out."""
    generator = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [generator.randrange(vocab_size) for _ in range(length)]

    ragged_prompts = [prompt(generator.randint(8, 200)) for _ in range(64)]
    ragged_lens = [generator.randint(8, 200) for _ in range(64)]
    return [
        Case("batch 1", 2.0, [prompt(32)], [128], (1,)),
        Case("batch 16, equal lengths", 1.5, [prompt(32) for _ in range(16)], [128] * 16, (16,)),
        Case("64 requests, ragged lengths", 3.0, ragged_prompts, ragged_lens, RAGGED_BATCH_SIZES),
    ]


def run_ours(llm: LLM, case: Case) -> int:
    """Runs the case; the tokens generated."""
    params = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in case.output_lens
    ]
    outputs = llm.generate(case.prompts, params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def run_transformers(model: Any, case: Case, batch_size: int) -> int:
    """Runs the case in padded batches in the order given; the tokens that were asked for."""
    for first in range(0, len(case.prompts), batch_size):
        prompts = case.prompts[first : first + batch_size]
        longest = max(map(len, prompts))
        token_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        num_tokens = max(case.output_lens[first : first + batch_size])
        with torch.inference_mode():
            output = model.generate(
                token_ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0
            )
        assert output.shape[1] == longest + num_tokens, "transformers stopped early"
    return sum(case.output_lens)


def timed(work: Callable[[], int]) -> tuple[int, float]:
    started_at = time.perf_counter()
    num_tokens = work()
    return num_tokens, time.perf_counter() - started_at


def compare(llm: LLM, model: Any, case: Case, repeats: int) -> dict[str, Any]:
    """Rates in tokens a second, medians over `repeats` runs that take turns, so that a busy moment hits both."""
    competitors: dict[str, Callable[[], int]] = {"miniinfer": lambda: run_ours(llm, case)}
    for size in case.batch_sizes:
        competitors[f"transformers, batches of {size}"] = lambda size=size: run_transformers(model, case, size)
    warm_up = {name: timed(work)[1] for name, work in competitors.items()}
    rates: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(repeats):
        for name, work in competitors.items():
            num_tokens, seconds = timed(work)
            assert num_tokens == sum(case.output_lens)
            rates[name].append(num_tokens / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = medians.pop("miniinfer")
    ratio = ours / max(medians.values())
    return {
        "case": case.name,
        "output_tokens": sum(case.output_lens),
        "miniinfer_tokens_per_second": ours,
        "transformers_tokens_per_second": medians,
        "ratio": ratio,
        "goal": case.goal,
        "is_reached": ratio >= case.goal,
        "first_run_seconds": warm_up,
    }


def load_transformers(folder: Path) -> Any:
    """The model in float32, which never stops by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def bench_vs_transformers(
    model: Annotated[str, typer.Option(help="A folder, a hub id or 'demo'.")] = "demo",
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 3,
) -> None:
    """Measures both engines on the three cases and prints JSON."""
    num_threads = os.cpu_count() or 1
    torch.set_num_threads(num_threads)
    folder = resolve(model)
    reference = load_transformers(folder)
    started_at = time.perf_counter()
    llm = LLM(folder, dtype="float32", max_num_seqs=64, max_model_len=512, enable_prefix_caching=False, use_tqdm=False)
    startup_seconds = time.perf_counter() - started_at
    cases = [compare(llm, reference, case, repeats) for case in make_cases(llm.model_config.vocab_size)]
    document = {
        "model": model,
        "num_threads": num_threads,
        "torch": torch.__version__,
        "miniinfer_startup_seconds": startup_seconds,  # loading and compiling
        "cases": cases,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(bench_vs_transformers)
    run(app)
