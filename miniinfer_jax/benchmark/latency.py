"""Time to the first token and time a token after it, by batch size, each beside the least that the device needs."""

import random
import time
from dataclasses import dataclass
from typing import Any

from miniinfer_jax.benchmark.report import bound, itemsize_of
from miniinfer_jax.benchmark.roofline import Ceilings, decode_cost, prefill_cost
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


def time_batch(engine: Any, prompts: list[list[int]], num_tokens: int) -> BatchTimes:
    """Hands in all prompts at once, then decodes `num_tokens` of each after the last one has its first token.

    Raises ValueError when the engine cannot hold all of them for so long.
    """
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None, detokenize=False)
    request_ids = [f"latency-{index}" for index in range(len(prompts))]
    num_before = engine.stats().num_prompt_tokens
    for request_id, prompt in zip(request_ids, prompts, strict=True):
        engine.add_request(request_id, prompt, params, streams=False)
    marks: list[tuple[float, int]] = []  # time and tokens generated, from when all sequences decode
    while not marks or marks[-1][1] - marks[0][1] < num_tokens * len(prompts):
        finished, stats = engine.step(), engine.stats()
        if finished:
            raise ValueError(
                f"a sequence ended before all {len(prompts)} had decoded {num_tokens} tokens; "
                "raise max_model_len or num_pages, or measure a smaller batch"
            )
        if stats.num_prompt_tokens - num_before == sum(map(len, prompts)):
            marks.append((time.perf_counter(), stats.num_generated_tokens))
    outputs = [engine.abort(request_id) for request_id in request_ids]
    while engine.has_unfinished_requests():
        engine.step()
    steady_tokens = (marks[-1][1] - marks[0][1]) / len(prompts)
    total_len = sum(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) for output in outputs)
    return BatchTimes(
        first_token=[output.metrics.first_token_time - output.metrics.arrival_time for output in outputs],
        seconds_per_token=(marks[-1][0] - marks[0][0]) / steady_tokens,
        mean_context=total_len / len(prompts) - steady_tokens / 2,
    )


def measure_latency(llm: Any, batch_size: int, input_len: int, num_tokens: int, ceilings: Ceilings) -> dict[str, Any]:
    """The figures of one batch size; times in seconds. A short first run, untimed, warms what a first run warms."""
    generator = random.Random(0)
    highest = min(MAX_TOKEN_ID, llm.model_config.vocab_size) - 1
    prompts = [[generator.randint(0, highest) for _ in range(input_len)] for _ in range(batch_size)]
    time_batch(llm.engine, prompts[:1], 2)
    times = time_batch(llm.engine, prompts, num_tokens)
    itemsize = itemsize_of(llm)
    prefill = bound(prefill_cost(llm.model_config, [input_len] * batch_size, itemsize, itemsize), ceilings)
    context_lens = [round(times.mean_context)] * batch_size
    decode = bound(decode_cost(llm.model_config, context_lens, itemsize, itemsize), ceilings)
    last_first_token = max(times.first_token)
    return {
        "batch_size": batch_size,
        "input_len": input_len,
        "mean_context": times.mean_context,
        "seconds_to_first_token": sum(times.first_token) / batch_size,
        "seconds_to_last_first_token": last_first_token,
        "prefill_roofline": {**prefill, "share": prefill["least_seconds"] / last_first_token},
        "seconds_per_token": times.seconds_per_token,
        "tokens_per_second": batch_size / times.seconds_per_token,
        "decode_roofline": {**decode, "share": decode["least_seconds"] / times.seconds_per_token},
    }
