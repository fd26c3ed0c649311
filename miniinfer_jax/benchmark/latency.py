"""Time to the first token and time a token after it, by batch size, each beside the least that the device needs."""

import random
import time
from dataclasses import dataclass
from typing import Any

from miniinfer_jax.benchmark.hlo_text import Cost
from miniinfer_jax.benchmark.profile import profile_steps
from miniinfer_jax.benchmark.report import itemsize_of, reached
from miniinfer_jax.benchmark.roofline import Ceilings, decode_attention_cost, decode_cost, prefill_cost
from miniinfer_jax.benchmark.throughput import MAX_TOKEN_ID
from miniinfer_jax.sampling_params import SamplingParams


@dataclass(frozen=True)
class BatchTimes:
    """How long a batch of equal requests took to start, and how fast it went when all of it was decoding.

    first_token: seconds of each request from being handed in; mean_context: keys a sequence while decoding.
    """

    first_token: list[float]
    seconds_per_token: float
    mean_context: float


def steps_to_start(batch_size: int, input_len: int, max_num_batched_tokens: int) -> int:
    """Steps until the last of equal prompts is through, when those that are through decode meanwhile."""
    return -(-batch_size * input_len // max(max_num_batched_tokens - batch_size, 1)) + 1


def start_batch(engine: Any, prompts: list[list[int]]) -> list[str]:
    """Hands in all prompts at once and steps until all of them decode; the ids of the requests."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None, detokenize=False)
    request_ids = [f"latency-{index}" for index in range(len(prompts))]
    num_to_read = engine.stats().num_prompt_tokens + sum(map(len, prompts))
    for request_id, prompt in zip(request_ids, prompts, strict=True):
        engine.add_request(request_id, prompt, params, streams=False)
    while engine.stats().num_prompt_tokens < num_to_read:
        step_unfinished(engine)
    return request_ids


def step_unfinished(engine: Any) -> None:
    """A step that ends no sequence; raises ValueError if it does: there was no room for the batch for so long."""
    if engine.step():
        raise ValueError(
            "a sequence ended before all of its batch had decoded as many tokens as are timed; "
            "raise max_model_len or num_pages, or measure a smaller batch"
        )


def end_batch(engine: Any, request_ids: list[str]) -> list[Any]:
    """The outputs so far of requests that are ended."""
    outputs = [engine.abort(request_id) for request_id in request_ids]
    while engine.has_unfinished_requests():
        engine.step()
    return outputs


def time_batch(engine: Any, prompts: list[list[int]], num_tokens: int) -> BatchTimes:
    """Hands in all prompts at once, then decodes `num_tokens` of each after the last one has its first token."""
    request_ids = start_batch(engine, prompts)
    started_at, num_before = time.perf_counter(), engine.stats().num_generated_tokens
    while engine.stats().num_generated_tokens - num_before < num_tokens * len(prompts):
        step_unfinished(engine)
    seconds, num_steady = time.perf_counter() - started_at, engine.stats().num_generated_tokens - num_before
    outputs = end_batch(engine, request_ids)
    steady_tokens = num_steady / len(prompts)
    total_len = sum(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) for output in outputs)
    return BatchTimes(
        first_token=[output.metrics.first_token_time - output.metrics.arrival_time for output in outputs],
        seconds_per_token=seconds / steady_tokens,
        mean_context=total_len / len(prompts) - steady_tokens / 2,
    )


def measure_latency(llm: Any, batch_size: int, input_len: int, num_tokens: int, ceilings: Ceilings) -> dict[str, Any]:
    """The figures of one batch size; times in seconds. A short first run, untimed, warms what a first run warms."""
    prompts = _draw_prompts(llm, batch_size, input_len)
    time_batch(llm.engine, prompts[:1], 2)
    times = time_batch(llm.engine, prompts, num_tokens)
    itemsize = itemsize_of(llm)
    prefill = prefill_cost(llm.model_config, [input_len] * batch_size, itemsize, itemsize)
    context_lens = [round(times.mean_context)] * batch_size
    decode = decode_cost(llm.model_config, context_lens, itemsize, itemsize)
    last_first_token = max(times.first_token)
    return {
        "batch_size": batch_size,
        "input_len": input_len,
        "mean_context": times.mean_context,
        "seconds_to_first_token": sum(times.first_token) / batch_size,
        "seconds_to_last_first_token": last_first_token,
        "prefill_roofline": reached(prefill, last_first_token, ceilings),
        "seconds_per_token": times.seconds_per_token,
        "tokens_per_second": batch_size / times.seconds_per_token,
        "decode_roofline": reached(decode, times.seconds_per_token, ceilings),
    }


def measure_prefill(llm: Any, batch_size: int, input_len: int, ceilings: Ceilings) -> dict[str, Any]:
    """Seconds from handing in a batch of equal prompts to the one token of the last; a run before it is not timed."""
    prompts = _draw_prompts(llm, batch_size, input_len)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1, detokenize=False)

    def seconds() -> float:
        started_at = time.perf_counter()
        for index, prompt in enumerate(prompts):
            llm.engine.add_request(f"prefill-{index}", prompt, params, streams=False)
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
        return time.perf_counter() - started_at

    _, elapsed = seconds(), seconds()
    itemsize = itemsize_of(llm)
    cost = prefill_cost(llm.model_config, [input_len] * batch_size, itemsize, itemsize)
    return {
        "batch_size": batch_size,
        "input_len": input_len,
        "seconds": elapsed,
        "prompt_tokens_per_second": batch_size * input_len / elapsed,
        "prefill_roofline": reached(cost, elapsed, ceilings),
    }


def profile_latency(llm: Any, figures: dict[str, Any], num_tokens: int, ceilings: Ceilings) -> dict[str, Any]:
    """The decode steps that `measure_latency` timed for these figures, once more, under the profiler."""
    batch_size = figures["batch_size"]
    context_lens = [round(figures["mean_context"])] * batch_size
    cost = decode_attention_cost(llm.model_config, context_lens, itemsize_of(llm))
    attention = Cost(cost.num_bytes, cost.operations)
    request_ids = start_batch(llm.engine, _draw_prompts(llm, batch_size, figures["input_len"]))
    wall_seconds = figures["seconds_per_token"]
    profile = profile_steps(llm, num_tokens, wall_seconds, ceilings, attention, num_rows=batch_size)
    end_batch(llm.engine, request_ids)
    return profile


def _draw_prompts(llm: Any, batch_size: int, input_len: int) -> list[list[int]]:
    generator = random.Random(0)
    highest = min(MAX_TOKEN_ID, llm.model_config.vocab_size) - 1
    return [[generator.randint(0, highest) for _ in range(input_len)] for _ in range(batch_size)]
