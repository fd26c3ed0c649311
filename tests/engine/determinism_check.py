"""Run by test_determinism.py in a process of its own, where XLA optimizes as it does for users: prints a JSON report.

Every request runs alone first; then among others, in other chunks, from cached prefixes, and in a pool so small that it
is preempted.
"""

import json
import sys
from collections import Counter

import numpy as np

from miniinfer_jax import LLM, SamplingParams


def make_requests(num_requests):
    generator = np.random.default_rng(0)
    prompts = [generator.integers(4, 97, size).tolist() for size in generator.integers(1, 120, num_requests)]
    params = [
        SamplingParams(
            temperature=(0.0, 0.8, 1.0)[index % 3],
            top_p=0.9 if index % 4 == 0 else 1.0,
            top_k=20 if index % 5 == 0 else 0,
            frequency_penalty=0.5 if index % 7 == 0 else 0.0,
            seed=index,
            max_tokens=30 + index % 33,
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=2 if index % 6 == 0 else None,
        )
        for index in range(num_requests)
    ]
    return prompts, params


def bits(output):
    """Tokens and every log-probability, exactly."""
    completion = output.outputs[0]
    prompt = [sorted((t, e.logprob) for t, e in entry.items()) for entry in (output.prompt_logprobs or []) if entry]
    drawn = [sorted((token, entry.logprob) for token, entry in position.items()) for position in completion.logprobs]
    return completion.token_ids, drawn, prompt


def finish(engine):
    """The last outputs of all requests."""
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step() if output.finished}
    return last


def differing_after_restore(first, second, prompts, params):
    """Which requests end otherwise in the second engine, which takes them up half way, than in the first."""
    for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        first.add_request(str(index), prompt, one, streams=False)
    for _ in range(len(prompts) // 2):
        first.step()
    snapshot = first.snapshot()
    second.restore(snapshot)
    assert second.stats().num_running and second.stats().num_waiting
    expected, got = finish(first), finish(second)
    return [request_id for request_id, output in got.items() if bits(output) != bits(expected[request_id])]


def main(folder, dtype, num_requests):
    prompts, params = make_requests(num_requests)

    def engine(**sizes):
        return LLM(
            folder,
            dtype=dtype,
            deterministic=True,
            max_num_seqs=num_requests,
            page_size=16,
            max_model_len=192,
            skip_tokenizer_init=True,
            use_tqdm=False,
            **sizes,
        )

    def differing(llm, order):
        outputs = llm.generate([prompts[i] for i in order], [params[i] for i in order], use_tqdm=False)
        return [i for i, output in zip(order, outputs, strict=True) if bits(output) != alone[i]]

    num_pages = 12 * num_requests  # of 16 tokens: enough for all
    llm = engine(num_pages=num_pages, enable_prefix_caching=False)
    cached = engine(num_pages=num_pages)
    alone = [bits(llm.generate(p, s, use_tqdm=False)[0]) for p, s in zip(prompts, params, strict=True)]
    everyone = list(range(num_requests))
    report = {
        "among_1": differing(llm, [5, 9]),
        "among_6": differing(llm, everyone[10:17]),
        "among_all": differing(llm, everyone),
        "among_all_reversed": differing(llm, everyone[::-1]),
        "cache_cold": differing(cached, everyone),
        "cache_warm": differing(cached, everyone),  # hits end wherever a prompt does, mostly inside a page
        "cache_warm_alone": [i for i in everyone[:12] if differing(cached, [i])],
        "chunks_of_24": differing(engine(num_pages=num_pages, max_num_batched_tokens=24), everyone),
        "chunks_of_7": differing(engine(num_pages=num_pages, max_num_batched_tokens=7), everyone[:12]),
    }
    report["restored"] = differing_after_restore(llm.engine, engine(num_pages=num_pages // 4).engine, prompts, params)
    small = engine(num_pages=20)
    report["preempted"] = differing(small, everyone)
    report["num_preemptions"] = small.engine.stats().num_preemptions
    report["num_cached_tokens"] = cached.engine.stats().num_prefix_hits
    # Had all requests the same bits, comparing them would say nothing.
    report["num_distinct"] = len(Counter(str(one) for one in alone))
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
