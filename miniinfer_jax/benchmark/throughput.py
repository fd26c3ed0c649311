"""Tokens a second over many requests of mixed lengths, beside the least time the device needs for them."""

import random
import time
from dataclasses import dataclass
from typing import Any

from miniinfer_jax.benchmark.profile import profile_steps, time_steps
from miniinfer_jax.benchmark.report import bound, itemsize_of, reached
from miniinfer_jax.benchmark.roofline import Ceilings, decode_run_cost, prefill_cost
from miniinfer_jax.sampling_params import SamplingParams

MAX_TOKEN_ID = 10_000
MAX_TRACED_STEPS = 32  # a trace of thousands takes minutes to read and says the same


@dataclass(frozen=True)
class Workload:
    """Random prompts and how many tokens to generate after each; the defaults are nano-vllm's benchmark."""

    num_requests: int = 256
    min_input: int = 100
    max_input: int = 1024
    min_output: int = 100
    max_output: int = 1024
    temperature: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"num_requests is {self.num_requests}; it must be at least 1")
        for name in ("input", "output"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if not 1 <= low <= high:
                raise ValueError(f"min_{name} is {low} and max_{name} {high}; they must be 1 <= min <= max")

    def draw(self, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """The prompts as token ids, and the output lengths."""
        generator = random.Random(self.seed)
        highest = min(MAX_TOKEN_ID, vocab_size) - 1
        prompts = [
            [generator.randint(0, highest) for _ in range(generator.randint(self.min_input, self.max_input))]
            for _ in range(self.num_requests)
        ]
        output_lens = [generator.randint(self.min_output, self.max_output) for _ in range(self.num_requests)]
        return prompts, output_lens


def measure_throughput(
    llm: Any, workload: Workload, max_num_seqs: int, ceilings: Ceilings, use_tqdm: bool
) -> dict[str, Any]:
    """Runs the workload once and returns its figures; times in seconds.

    The bound assumes the densest batches that max_num_seqs allows, whatever the page pool held.
    """
    prompts, output_lens = workload.draw(llm.model_config.vocab_size)
    params = _sampling_params(workload, output_lens)
    llm.generate(prompts[:1], SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False), use_tqdm=False)
    num_steps_before = llm.engine.stats().num_steps
    started_at = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=use_tqdm)
    seconds = time.perf_counter() - started_at
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    prompt_lens = [len(prompt) for prompt in prompts]
    itemsize = itemsize_of(llm)
    lengths = list(zip(prompt_lens, output_lens, strict=True))
    prefill_part = prefill_cost(llm.model_config, prompt_lens, itemsize, itemsize)
    decode_part = decode_run_cost(llm.model_config, lengths, max_num_seqs, itemsize, itemsize)
    prefill, decode = bound(prefill_part, ceilings), bound(decode_part, ceilings)
    least = prefill["least_seconds"] + decode["least_seconds"]
    return {
        "num_requests": len(prompts),
        "prompt_tokens": sum(prompt_lens),
        "output_tokens": num_output,
        "seconds": seconds,
        "num_steps": llm.engine.stats().num_steps - num_steps_before,
        "requests_per_second": len(prompts) / seconds,
        "output_tokens_per_second": num_output / seconds,
        "total_tokens_per_second": (num_output + sum(prompt_lens)) / seconds,
        "roofline": {
            **reached(prefill_part + decode_part, seconds, ceilings),
            "prefill": prefill,
            "decode": decode,
            # Prompts are bound by arithmetic and decoding by reading: one after the other, they don't overlap.
            "least_seconds": least,
            "output_tokens_per_second": num_output / least,
            "share": least / seconds,
        },
    }


def profile_throughput(llm: Any, workload: Workload, num_steps: int, ceilings: Ceilings) -> dict[str, Any]:
    """Runs the workload, of num_steps steps, again up to its middle: times some steps there, and traces as many."""
    prompts, output_lens = workload.draw(llm.model_config.vocab_size)
    request_ids = [f"profile-{index}" for index in range(len(prompts))]
    params = _sampling_params(workload, output_lens)
    for request_id, prompt, one in zip(request_ids, prompts, params, strict=True):
        llm.engine.add_request(request_id, prompt, one, streams=False)
    num_traced = max(1, min(MAX_TRACED_STEPS, num_steps // 4))
    for _ in range(num_steps // 2 - num_traced):
        llm.engine.step()
    wall_seconds = time_steps(llm.engine, num_traced)
    profile = profile_steps(llm, num_traced, wall_seconds, ceilings)
    for request_id in request_ids:
        llm.engine.abort(request_id)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    return profile


def _sampling_params(workload: Workload, output_lens: list[int]) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=workload.temperature, ignore_eos=True, max_tokens=length, detokenize=False)
        for length in output_lens
    ]
