"""The engine from outside: whatever shares the batch, a request gets the tokens that it gets alone."""

import jax
import numpy as np
import pytest
from jax import monitoring

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.batch import SamplingInputs
from tests.engine.cases import GREEDY, SMALL, make_prompts, tokens_of
from tests.tiny import make_checkpoint

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)

pytestmark = pytest.mark.usefixtures("pages_come_back")


def test_alone(llm, expected):
    assert [tokens_of(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in make_prompts(10)] == expected


def test_batched_and_chunked(llm, expected):
    """150-token prompts in steps of 64 tokens: chunks and decoding sequences share steps."""
    assert tokens_of(llm.generate(make_prompts(10), GREEDY, use_tqdm=False)) == expected


def test_preempted(folder, llm):
    small_pool = LLM(folder, num_pages=16, **SMALL)
    assert tokens_of(small_pool.generate(make_prompts(10), LONG, use_tqdm=False)) == tokens_of(
        llm.generate(make_prompts(10), LONG, use_tqdm=False)
    )
    assert small_pool.engine.stats().num_preemptions > 0
    small_pool.engine.check()


def test_streamed(llm, expected):
    streamed = {index: [] for index in range(10)}
    reasons = {}
    for delta in llm.stream(make_prompts(10), GREEDY):
        streamed[delta.prompt_index] += delta.token_ids
        reasons[delta.prompt_index] = delta.finish_reason
    assert list(streamed.values()) == expected
    assert set(reasons.values()) == {"length"}


def test_joining_at_any_step(llm, expected):
    engine, got = llm.engine, {}
    for index, prompt in enumerate(make_prompts(10)):
        engine.add_request(f"r{index}", prompt, GREEDY, streams=False)
        for _ in range(index):
            got |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    while engine.has_unfinished_requests():
        got |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    assert [got[f"r{index}"] for index in range(10)] == expected


def test_abort_at_any_point(llm, expected):
    engine, prompts = llm.engine, make_prompts(10)
    for steps in (0, 1, 2, 3, 5, 8):
        for index, prompt in enumerate(prompts):
            engine.add_request(f"r{index}", prompt, GREEDY, streams=False)
        got = {}
        for _ in range(steps):
            got |= {output.request_id: output for output in engine.step()}
        aborted = engine.abort("r1")
        assert aborted is None or aborted.outputs[0].finish_reason == "abort" or "r1" in got
        assert engine.abort("r1") is None
        assert engine.abort("unknown") is None
        while engine.has_unfinished_requests():
            got |= {output.request_id: output for output in engine.step()}
        for index in {0, *range(2, 10)}:
            assert got[f"r{index}"].outputs[0].token_ids == expected[index]
        engine.check()


def test_leaving_a_stream_early_aborts(llm, expected):
    for delta in llm.stream(make_prompts(10), GREEDY):
        if delta.prompt_index == 2:
            break
    assert not llm.engine.has_unfinished_requests()
    assert tokens_of(llm.generate(make_prompts(10), GREEDY, use_tqdm=False)) == expected


def test_calls_may_overlap(llm, expected):
    """A whole generate() between two pieces of a stream: each call gets its own outputs."""
    stream, streamed = llm.stream(make_prompts(10)[:3], GREEDY), {0: [], 1: [], 2: []}
    for delta in stream:
        streamed[delta.prompt_index] += delta.token_ids
        if delta.prompt_index == 1 and len(streamed[1]) == 5:
            assert tokens_of(llm.generate(make_prompts(10), GREEDY, use_tqdm=False)) == expected
    assert list(streamed.values()) == expected[:3]


def test_a_stream_that_nobody_reads_queues_nothing(llm):
    llm.stream(make_prompts(3), GREEDY)
    assert not llm.engine.has_requests()


def test_interrupt_leaves_a_working_engine(llm, expected, monkeypatch):
    original, calls = llm.engine.step, []

    def interrupted(request_ids=None):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(request_ids)

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(make_prompts(10), GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert tokens_of(llm.generate(make_prompts(10), GREEDY, use_tqdm=False)) == expected


def test_a_long_prompt_stops_others_for_one_step_at_most(llm):
    """While 200 tokens are prefilled in chunks of 63, the running stream gets a token in every step."""
    engine = llm.engine
    engine.add_request("short", [5, 6, 7], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    for _ in range(4):
        engine.step()
    engine.add_request("long", [9] * 200, GREEDY)
    counts = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id == "short":
                counts.append(len(output.outputs[0].token_ids))
    assert counts == list(range(counts[0], 31))


class CompileCounter:
    """Counts programs that reach XLA's compiler, or are read from the compile cache, while it is open."""

    def __enter__(self):
        self.count = 0
        monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *_):
        monitoring.unregister_event_duration_listener(self._listen)


def test_the_compile_counter_counts():
    with CompileCounter() as counter:
        jax.jit(lambda x: x * 3 + 1)(np.arange(7))
    assert counter.count >= 1


def test_nothing_compiles_after_the_start(folder):
    llm = LLM(folder, num_pages=16, **SMALL)
    mixed = [
        SamplingParams(temperature=0, max_tokens=7),
        SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, seed=1, max_tokens=33, ignore_eos=True),
        SamplingParams(n=3, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2, max_tokens=12),
        SamplingParams(logprobs=5, prompt_logprobs=3, logit_bias={5: 2.0}, min_tokens=4, stop_token_ids=[9]),
        SamplingParams(allowed_token_ids=[4, 5, 6], max_tokens=60),
    ]
    with CompileCounter() as counter:
        for size in (1, 2, 3, 10, 25):
            prompts = make_prompts(size, seed=size)
            outputs = llm.generate(prompts, [mixed[i % 5] for i in range(size)], use_tqdm=False)
            assert all(output.finished and output.error is None for output in outputs)
            llm.generate(prompts[0], GREEDY, use_tqdm=False)  # a hit, mostly inside a page
        llm.score(make_prompts(3), use_tqdm=False)
        next(llm.stream(make_prompts(3), GREEDY))
        llm.engine.add_request("parent", make_prompts(1)[0], GREEDY)
        for _ in range(4):
            llm.engine.step()
        llm.fork("parent", "child")
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
    assert llm.engine.stats().num_preemptions > 0 and llm.engine.stats().num_prefix_hits > 0
    assert counter.count == 0


def test_the_host_runs_one_step_ahead(llm, monkeypatch):
    """A step is read only after the next one was dispatched, and each step sends one packed array."""
    runner, events = llm.engine._runner, []
    run = runner.run

    def recorded_run(plan):
        step = run(plan)
        events.append(("dispatch", id(step.output)))
        read = type(step).token_ids

        monkeypatch.setattr(
            type(step),
            "token_ids",
            lambda self: events.append(("read", id(self.output))) or np.asarray(self.output.token_ids),
        )
        assert read is not None
        return step

    sent = []
    programs = dict(runner._programs)

    def counting(program):
        def call(*arguments):
            sent.append(sum(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(arguments)))
            return program(*arguments)

        return call

    puts = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda array: puts.append(array.shape) or put(array))
    monkeypatch.setattr(runner, "run", recorded_run)
    monkeypatch.setattr(runner, "_programs", {key: counting(program) for key, program in programs.items()})
    with jax.transfer_guard_device_to_host("allow"):
        llm.generate(make_prompts(4), GREEDY, use_tqdm=False)
    assert set(sent) == {0, 1}  # a decode step's array was put before, once for as long as it stays the same
    assert len(puts) <= sent.count(0)
    order = [step for kind, step in events if kind == "dispatch"]
    for place, (kind, step) in enumerate(events):
        if kind == "read" and step != order[-1]:
            following = order[order.index(step) + 1]
            assert ("dispatch", following) in events[:place], "a step was read before the next was dispatched"


def test_warming_up_leaves_no_trace(llm, expected):
    runner = llm.engine._runner
    before = jax.device_get((runner._cache, runner._state))
    runner.warm_up()
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((runner._cache, runner._state)))
    assert tokens_of(llm.generate(make_prompts(10), GREEDY, use_tqdm=False)) == expected


def test_the_cache_is_updated_in_place(llm):
    runner = llm.engine._runner
    cache_bytes = sum(array.nbytes for array in jax.tree.leaves(runner._cache))
    for name, program in runner._programs.items():
        if not isinstance(name, str):  # a step
            assert program.memory_analysis().alias_size_in_bytes >= cache_bytes
    before = [array.unsafe_buffer_pointer() for array in runner._cache.layers]
    llm.generate(make_prompts(4), GREEDY, use_tqdm=False)
    assert [array.unsafe_buffer_pointer() for array in runner._cache.layers] == before


def test_nan_ends_its_own_request_only(tmp_path, folder):
    llm = LLM(make_checkpoint(tmp_path / "poisoned", nan_token=50), num_pages=40, **SMALL)
    prompts = [[token for token in prompt if token != 50] or [4] for prompt in make_prompts(6)]
    alone = tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False))
    mixed = llm.generate([[*prompts[0], 50, 5], *prompts, [50]], GREEDY, use_tqdm=False)
    for bad in (mixed[0], mixed[-1]):
        assert bad.outputs[0].finish_reason == "error"
        assert "NaN" in bad.error
        assert bad.outputs[0].token_ids == []
    assert tokens_of(mixed[1:-1]) == alone
    llm.generate([50], GREEDY, use_tqdm=False)
    assert any(np.isnan(np.asarray(array)).any() for array in llm.engine._runner._cache.layers)
    # The pages that held NaN are given to others now.
    assert tokens_of(llm.generate(prompts * 3, GREEDY, use_tqdm=False)) == alone * 3


def test_score_is_the_log_probability_of_each_token(llm):
    prompt = make_prompts(1, seed=5)[0]
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12, logprobs=2, ignore_eos=True))[0]
    whole = prompt + output.outputs[0].token_ids
    score = llm.score([whole], use_tqdm=False)[0]
    drawn = [
        entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, whole[len(prompt) :], strict=True)
    ]
    np.testing.assert_allclose(score.logprobs[len(prompt) :], drawn, atol=1e-5)
    assert score.logprobs[0] is None
    assert output.outputs[0].cumulative_logprob == pytest.approx(sum(drawn))
    assert all(
        entry[token].rank == 1 for entry, token in zip(output.outputs[0].logprobs, whole[len(prompt) :], strict=True)
    )


def test_prompt_logprobs_of_chunked_prompts(llm):
    prompts = make_prompts(6, seed=8)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=4)
    batched = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, batched, strict=True):
        assert len(output.prompt_logprobs) == len(prompt)
        for token, entry in list(zip(prompt, output.prompt_logprobs, strict=True))[1:]:
            assert token in entry and 4 <= len(entry) <= 5
            best = [found for found in entry.values() if found.rank == 1]
            assert best and max(entry.values(), key=lambda found: found.logprob).rank == 1


def test_seeds_decide_draws(llm):
    params = SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=15, ignore_eos=True)
    prompt = make_prompts(1)[0]
    first = llm.generate(prompt, params, use_tqdm=False)[0]
    again = llm.generate([make_prompts(2, seed=9)[0], prompt], [GREEDY, params], use_tqdm=False)[1]
    samples = [completion.token_ids for completion in first.outputs]
    assert samples == [completion.token_ids for completion in again.outputs]
    assert len({tuple(sample) for sample in samples}) == 3
    second = SamplingParams(temperature=1.0, seed=8, max_tokens=15, ignore_eos=True)
    assert llm.generate(prompt, second, use_tqdm=False)[0].outputs[0].token_ids == samples[1]


def test_own_logits_processor(folder):
    def only_even_tokens(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
        tokens = jax.numpy.arange(logits.shape[-1])
        return jax.numpy.where(tokens % 2 == 0, logits, -jax.numpy.inf)

    llm = LLM(folder, logits_processors=[only_even_tokens], **SMALL)
    outputs = llm.generate(make_prompts(4), SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False)
    assert all(token % 2 == 0 for output in outputs for token in output.outputs[0].token_ids)


def test_token_rules(llm):
    prompt = make_prompts(1, seed=2)[0]

    def run(**values):
        return llm.generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 12} | values), use_tqdm=False)[0]

    free = run(ignore_eos=True).outputs[0].token_ids
    assert set(run(allowed_token_ids=[11, 12], ignore_eos=True).outputs[0].token_ids) <= {11, 12}
    assert run(logit_bias={13: 1e4}, ignore_eos=True).outputs[0].token_ids == [13] * 12
    assert free[0] not in run(logit_bias={free[0]: -1e4}, ignore_eos=True).outputs[0].token_ids
    stopped = run(stop_token_ids=[free[4]], ignore_eos=True).outputs[0]
    assert stopped.token_ids == free[: free.index(free[4]) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", free[4])
    later = run(stop_token_ids=[free[4]], min_tokens=8, ignore_eos=True).outputs[0]
    assert len(later.token_ids) >= 8 and free[4] not in later.token_ids[:7]
    forced_end = run(logit_bias={3: 1e4}).outputs[0]
    assert (forced_end.token_ids, forced_end.finish_reason, forced_end.stop_reason) == ([3], "stop", None)
    spread = run(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=5.0, ignore_eos=True)
    assert len(set(spread.outputs[0].token_ids)) >= len(set(free))
    assert run(ignore_eos=True).outputs[0].token_ids == free


def test_calls_and_a_driven_engine_share_it(llm):
    """What a call's steps have to tell of requests that others drive comes with the others' next step."""
    prompts = make_prompts(2)
    expected = tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False))
    llm.engine.add_request("mine", prompts[0], GREEDY, streams=False)
    assert tokens_of(llm.generate(prompts[1:], GREEDY, use_tqdm=False)) == expected[1:]
    outputs = []
    while llm.engine.has_unfinished_requests():
        outputs += llm.engine.step()
    assert tokens_of(outputs) == expected[:1]


def test_an_output_is_the_users_own(llm):
    prompt = make_prompts(1)[0]
    expected = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    llm.engine.add_request("changed", prompt, GREEDY)
    last = None
    while llm.engine.has_unfinished_requests():
        for last in llm.engine.step():
            last.prompt_token_ids.clear()
    assert last.outputs[0].token_ids == expected
