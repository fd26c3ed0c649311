"""What the prefix cache saves: time to the first token of requests that share a system prompt, and what a lookup costs.

python scripts/bench_prefix.py  # the demo model's size with random weights, 200 requests that share 1,500 tokens
python scripts/bench_prefix.py --num-requests 12 --system-len 200 --num-cached-pages 2000 --json
"""

import gc
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer

from miniinfer_jax import LLM, RequestOutput, SamplingParams
from miniinfer_jax.cli import run
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.prefix_cache import PrefixCache
from miniinfer_jax.sequence import Sequence
from miniinfer_jax.weights import resolve

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
PAGE_SIZE = 16
VOCAB_SIZE = 1024
NUM_LOOKUPS = 200


def write_long_demo(folder: Path, max_len: int) -> Path:
    """The folder, now holding the demo model's config.json, made to know `max_len` positions."""
    config = json.loads((Path(resolve("demo", None)) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": max_len, "eos_token_id": None}))
    return folder


def make_prompts(num_requests: int, system_len: int, question_len: int) -> list[list[int]]:
    """Random questions behind one random system prompt."""
    generator = random.Random(0)
    system = [generator.randrange(VOCAB_SIZE) for _ in range(system_len)]
    return [system + [generator.randrange(VOCAB_SIZE) for _ in range(question_len)] for _ in range(num_requests)]


def seconds_to_first_token(output: RequestOutput) -> float:
    assert output.metrics is not None and output.metrics.first_token_time is not None
    return output.metrics.first_token_time - output.metrics.arrival_time


def measure(llm: LLM, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """Hands in all prompts at once, with an empty cache: seconds to the first token and over all, counts."""
    llm.reset_prefix_cache()
    before, started_at = llm.engine.stats(), time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, stats = time.perf_counter() - started_at, llm.engine.stats()
    waits = sorted(map(seconds_to_first_token, outputs))
    return {
        "mean_seconds_to_first_token": mean(waits),
        "median_seconds_to_first_token": median(waits),
        "p99_seconds_to_first_token": waits[int(0.99 * (len(waits) - 1))],
        "seconds": seconds,
        "prompt_tokens": sum(map(len, prompts)),
        "cached_tokens": stats.num_prefix_hits - before.num_prefix_hits,
        "tokens": [output.outputs[0].token_ids for output in outputs],
    }


def measure_lookups(num_cached_pages: int, prompt_len: int) -> dict[str, Any]:
    """Milliseconds to find a prompt of which all but the last page is there, in a tree of so many pages."""
    cache = PrefixCache(PageAllocator(num_cached_pages), PAGE_SIZE, enabled=True)
    generator, prompts = random.Random(1), []
    while cache.allocator.num_free:
        num_pages = min(prompt_len // PAGE_SIZE, cache.allocator.num_free)
        tokens = [generator.randrange(VOCAB_SIZE) for _ in range(num_pages * PAGE_SIZE)]
        sequence = Sequence(len(prompts), tokens, SamplingParams(), seed=0, max_len=len(tokens) + 1)
        sequence.pages, sequence.num_computed = cache.allocate(num_pages), len(tokens)
        cache.begin_plan()
        cache.insert(sequence)
        cache.release(sequence.pages)
        cache.leave(sequence)
        prompts.append(tokens)
    cache.begin_plan()
    gc.collect()  # of what filling the tree left behind
    times = []
    for number in range(NUM_LOOKUPS):
        tokens = list(prompts[number % (len(prompts) - 1)])
        sequence = Sequence(number, tokens, SamplingParams(), seed=0, max_len=len(tokens) + 1)
        started_at = time.perf_counter()
        prefix = cache.match(sequence, sequence.max_shared_len)
        times.append(1e3 * (time.perf_counter() - started_at))
        assert prefix.num_tokens == len(tokens) - 1
        cache.leave(sequence)
    return {
        "num_cached_pages": num_cached_pages,
        "prompt_len": prompt_len,
        "median_milliseconds": median(times),
        "p99_milliseconds": sorted(times)[int(0.99 * (len(times) - 1))],
    }


@app.command()
def bench_prefix(
    num_requests: Annotated[int, typer.Option(help="Requests that share the system prompt.")] = 200,
    system_len: Annotated[int, typer.Option(help="Tokens of the system prompt.")] = 1500,
    question_len: Annotated[int, typer.Option(help="Tokens of each question behind it.")] = 40,
    num_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences in a step.")] = 32,
    num_cached_pages: Annotated[int, typer.Option(help="Pages of the tree in which lookups are timed.")] = 100_000,
    lookup_len: Annotated[int, typer.Option(help="Tokens of each prompt that is looked up.")] = 4000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """The same requests with the cache off and on, each from an empty cache; then lookups alone."""
    prompts = make_prompts(num_requests, system_len, question_len)
    max_len = system_len + question_len + num_tokens
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_long_demo(Path(folder), max_len)
        for name, enabled in (("off", False), ("on", True)):
            llm = LLM(
                model,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_num_seqs=max_num_seqs,
                page_size=PAGE_SIZE,
                num_pages=(max_num_seqs + 2) * (max_len // PAGE_SIZE + 1),
                enable_prefix_caching=enabled,
                use_tqdm=False,
            )
            measure(llm, [prompt[-question_len:] for prompt in prompts[:2]], 2)  # warms what a first run warms
            figures[name] = measure(llm, prompts, num_tokens)
            del llm
    is_same = figures["off"].pop("tokens") == figures["on"].pop("tokens")
    figures["same_tokens"] = is_same
    figures["speedup"] = figures["off"]["mean_seconds_to_first_token"] / figures["on"]["mean_seconds_to_first_token"]
    figures["lookup"] = measure_lookups(num_cached_pages, lookup_len)
    if as_json:
        print(json.dumps(figures))
    else:
        _print(figures, num_requests, system_len)


def _print(figures: dict[str, Any], num_requests: int, system_len: int) -> None:
    print(f"{num_requests} requests that share {system_len} tokens, handed in at once")
    print(f"{'cache':<6}{'mean s to first':>16}{'median':>9}{'p99':>9}{'all, s':>9}{'tokens in':>11}{'cached':>9}")
    for name in ("off", "on"):
        row = figures[name]
        waits = [row[f"{kind}_seconds_to_first_token"] for kind in ("mean", "median", "p99")]
        print(
            f"{name:<6}{waits[0]:>16.2f}{waits[1]:>9.2f}{waits[2]:>9.2f}{row['seconds']:>9.2f}"
            f"{row['prompt_tokens']:>11}{row['cached_tokens']:>9}"
        )
    same = "the same tokens" if figures["same_tokens"] else "OTHER TOKENS"
    lookup = figures["lookup"]
    print(f"first token {figures['speedup']:.1f}x sooner, {same}")
    print(
        f"finding {lookup['prompt_len']} tokens among {lookup['num_cached_pages']} pages: "
        f"{lookup['median_milliseconds']:.3f} ms (p99 {lookup['p99_milliseconds']:.3f})"
    )


if __name__ == "__main__":
    run(app)
