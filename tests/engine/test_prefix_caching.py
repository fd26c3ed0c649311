"""The prefix cache and forks through the real engine: the same tokens, less work, and nothing that harms another."""

import numpy as np
import pytest

from miniinfer_jax import LLM, SamplingParams
from tests.engine.cases import GREEDY, SMALL, make_prompts, tokens_of
from tests.tiny import make_checkpoint

PAGE_SIZE = 16  # of a CPU


@pytest.fixture(scope="module")
def uncached(folder):
    return LLM(folder, enable_prefix_caching=False, **SMALL)


@pytest.fixture
def fresh(llm):
    """The engine with an empty cache."""
    assert llm.reset_prefix_cache()
    yield llm
    assert not llm.engine.has_unfinished_requests()
    llm.engine.check()


def drain(engine) -> dict:
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs


def run(llm, prompt, params=GREEDY):
    return llm.generate(prompt, params, use_tqdm=False)[0]


def test_the_same_tokens_and_fewer_of_them_computed(fresh, uncached):
    prompts = [prompt for prompt in make_prompts(10) if len(prompt) > PAGE_SIZE]
    expected = tokens_of(uncached.generate(prompts, GREEDY, use_tqdm=False))
    for prompt, tokens in zip(prompts, expected, strict=True):
        first, again, shorter = run(fresh, prompt), run(fresh, prompt), run(fresh, prompt[:-3])
        assert first.outputs[0].token_ids == again.outputs[0].token_ids == tokens
        assert first.num_cached_tokens <= PAGE_SIZE // 2  # by chance
        assert again.num_cached_tokens == len(prompt) - 1
        assert shorter.num_cached_tokens == len(prompt) - 4
        assert shorter.outputs[0].token_ids == run(uncached, prompt[:-3]).outputs[0].token_ids
    stats = fresh.engine.stats()
    assert 0 < stats.num_prefix_hits < stats.num_prefix_queries
    assert uncached.engine.stats().num_cached_pages == uncached.engine.stats().num_prefix_hits == 0


def test_hits_that_end_at_every_place_of_a_page(fresh, uncached):
    prompt = make_prompts(1, seed=3, longest=60)[0] + list(range(5, 90))
    run(fresh, prompt)
    for length in range(30, 30 + 2 * PAGE_SIZE):
        other = [*prompt[:length], 4, 4, 4]
        output = run(fresh, other)
        assert output.num_cached_tokens >= length
        assert output.outputs[0].token_ids == run(uncached, other).outputs[0].token_ids


def test_a_second_turn_is_a_hit_of_prompt_and_answer(fresh, uncached):
    prompt = make_prompts(1, seed=1)[0]
    answer = run(fresh, prompt).outputs[0].token_ids
    turn = [*prompt, *answer, 7, 8, 9]
    output = run(fresh, turn)
    assert output.num_cached_tokens >= (len(prompt) + len(answer) - 1) // PAGE_SIZE * PAGE_SIZE > len(prompt)
    assert output.outputs[0].token_ids == run(uncached, turn).outputs[0].token_ids


def test_requests_that_begin_alike_share_while_they_run(fresh, uncached):
    common = [9, 8, 7, 6] * 12
    prompts = [[*common, number, number + 1] for number in range(4, 40, 5)]
    outputs = fresh.generate(prompts, GREEDY, use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(uncached.generate(prompts, GREEDY, use_tqdm=False))
    assert [output.num_cached_tokens >= len(common) for output in outputs] == [False] + [True] * 7


def test_a_pool_that_is_always_full_evicts_and_stays_right(folder, uncached):
    llm = LLM(folder, num_pages=16, **SMALL)
    prompts = [prompt for prompt in make_prompts(15, seed=4) for _ in range(2)]
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(uncached.generate(prompts, params, use_tqdm=False))
    stats = llm.engine.stats()
    assert stats.num_evictions > 0 and stats.num_prefix_hits > 0 and stats.num_preemptions > 0
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages
    llm.engine.check()


def test_samples_share_the_prompt_and_draw_their_own(fresh, uncached):
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=20, ignore_eos=True, logprobs=1)
    prompt = make_prompts(1, seed=6)[0]
    output, other = run(fresh, prompt, params), run(uncached, prompt, params)
    texts = [completion.token_ids for completion in output.outputs]
    assert texts == [completion.token_ids for completion in other.outputs]
    assert len({tuple(text) for text in texts}) == 4
    for index, completion in enumerate(output.outputs):
        alone = run(uncached, prompt, SamplingParams(temperature=1.0, seed=5 + index, max_tokens=20, ignore_eos=True))
        assert completion.token_ids == alone.outputs[0].token_ids


def test_64_samples_use_the_pages_of_a_long_prompt_once(tmp_path):
    folder = make_checkpoint(tmp_path / "long", max_position_embeddings=2048)
    sizes = SMALL | {"max_num_seqs": 64, "max_model_len": 2048, "max_num_batched_tokens": 512}
    llm = LLM(folder, num_pages=400, **sizes)
    prompt = np.random.default_rng(0).integers(4, 97, 2000).tolist()  # 125 full pages
    params = SamplingParams(n=64, temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
    engine, num_used = llm.engine, []
    engine.add_request("many", prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            last = output
        stats = engine.stats()
        num_used.append(stats.num_pages - stats.num_free_pages - stats.num_cached_pages)
    assert 125 in num_used
    assert max(num_used) == 125 + 64 * 2
    assert len({tuple(completion.token_ids) for completion in last.outputs}) > 60
    assert engine.stats().num_prompt_tokens == 2000


def test_token_rules_of_a_hit_and_of_samples(fresh, uncached):
    """What is sent with the first chunk of a request is sent with the first one that is computed."""
    prompt = make_prompts(1, seed=7)[0]
    for params in (
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, presence_penalty=2.0, repetition_penalty=3.0),
        SamplingParams(n=3, seed=2, max_tokens=20, ignore_eos=True, frequency_penalty=2.0, logit_bias={5: 4.0}),
        SamplingParams(temperature=0, max_tokens=20, allowed_token_ids=[5, 6, 7, 8], presence_penalty=0.1),
    ):
        expected = [completion.token_ids for completion in run(uncached, prompt, params).outputs]
        for _ in range(2):
            output = run(fresh, prompt, params)
            assert [completion.token_ids for completion in output.outputs] == expected
        assert output.num_cached_tokens == len(prompt) - 1


def test_prompt_logprobs_are_those_of_a_cold_cache(fresh, uncached):
    prompt = make_prompts(1, seed=8)[0]
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2, ignore_eos=True)
    expected = run(uncached, prompt, params)
    run(fresh, prompt)
    output = run(fresh, prompt, params)
    assert output.num_cached_tokens == 0
    assert len(output.prompt_logprobs) == len(prompt)
    for found, wanted in zip(output.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert found.keys() == wanted.keys()
        assert [one.logprob for one in found.values()] == pytest.approx([one.logprob for one in wanted.values()])
    samples = SamplingParams(n=3, seed=1, max_tokens=4, prompt_logprobs=2, ignore_eos=True)
    before = fresh.engine.stats().num_prefix_hits
    assert len(run(fresh, prompt, samples).prompt_logprobs) == len(prompt)
    assert fresh.engine.stats().num_prefix_hits == before + 2 * len(prompt)
    assert fresh.score([prompt], use_tqdm=False)[0].total == pytest.approx(
        uncached.score([prompt], use_tqdm=False)[0].total, abs=1e-4
    )


def test_scores_of_preempted_prompts_have_no_holes(folder, uncached):
    llm = LLM(folder, num_pages=16, **SMALL)
    prompts = make_prompts(12, seed=9)
    params = SamplingParams(temperature=0, max_tokens=60, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert llm.engine.stats().num_preemptions > 0
    for output, expected in zip(outputs, uncached.generate(prompts, params, use_tqdm=False), strict=True):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        found, wanted = (
            [next(iter(entry.values())).logprob for entry in one.prompt_logprobs[1:]] for one in (output, expected)
        )
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_salts_keep_tenants_apart(fresh):
    prompt = make_prompts(1, seed=10)[0]

    def hits(salt):
        return run(fresh, {"prompt_token_ids": prompt, "cache_salt": salt}).num_cached_tokens

    assert [hits("a"), hits("b"), hits("a")] == [0, 0, len(prompt) - 1]
    assert run(fresh, prompt).num_cached_tokens == 0
    assert run(fresh, {"prompt_token_ids": prompt}).num_cached_tokens == len(prompt) - 1


@pytest.mark.parametrize("salt", ["", 5, b"a", ["a"]])
def test_a_salt_that_is_no_text_is_refused(fresh, salt):
    prompt = {"prompt_token_ids": [4, 5], "cache_salt": salt}
    with pytest.raises(ValueError, match="cache_salt is .* must be a text that is not empty"):
        run(fresh, prompt)
    with pytest.raises(ValueError, match="cache_salt"):
        fresh.stream([prompt])
    with pytest.raises(ValueError, match="cache_salt"):
        fresh.engine.add_request("salted", [4, 5], GREEDY, cache_salt=salt)
    assert not fresh.engine.has_requests()


def test_nan_leaves_nothing_in_the_cache(tmp_path):
    llm = LLM(make_checkpoint(tmp_path / "poisoned", nan_token=50), num_pages=40, **SMALL)
    good = [token for token in make_prompts(1, seed=11)[0] if token != 50]
    tokens = run(llm, good).outputs[0].token_ids
    num_cached = llm.engine.stats().num_cached_pages
    bad = [5, 6, 50, *range(4, 44)]
    for _ in range(2):
        output = run(llm, bad)
        assert output.outputs[0].finish_reason == "error" and output.num_cached_tokens <= 2
        assert llm.engine.stats().num_cached_pages == num_cached
    assert run(llm, [5, 6, 7, *range(4, 44)]).error is None
    assert run(llm, good).outputs[0].token_ids == tokens


def test_reset(fresh):
    prompt = make_prompts(1, seed=12)[0]
    run(fresh, prompt)
    engine = fresh.engine
    assert engine.stats().num_cached_pages > 0
    engine.add_request("running", prompt, GREEDY)
    engine.step()
    assert not fresh.reset_prefix_cache()
    drain(engine)
    assert fresh.reset_prefix_cache()
    assert engine.stats().num_free_pages == engine.stats().num_pages
    assert run(fresh, prompt).num_cached_tokens == 0


def test_a_step_that_does_not_reach_the_device_poisons_nothing(fresh, uncached, monkeypatch):
    prompt = make_prompts(1, seed=13)[0]
    monkeypatch.setattr(fresh.engine._runner, "run", lambda plan: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(fresh, prompt)
    monkeypatch.undo()
    output = run(fresh, prompt)
    assert output.num_cached_tokens == 0
    assert output.outputs[0].token_ids == run(uncached, prompt).outputs[0].token_ids


def test_requests_go_on_after_a_step_that_was_lost(fresh, uncached, monkeypatch):
    engine, prompts = fresh.engine, make_prompts(3, seed=14)
    for index, prompt in enumerate(prompts):
        engine.add_request(f"r{index}", prompt, GREEDY)
    original, calls = engine._runner.run, []

    def failing(plan):
        calls.append(plan)
        if len(calls) in (1, 4, 9):
            raise MemoryError
        return original(plan)

    monkeypatch.setattr(engine._runner, "run", failing)
    outputs = {}
    while engine.has_unfinished_requests():
        try:
            outputs |= {output.request_id: output for output in engine.step()}
        except MemoryError:
            engine.check()
    expected = tokens_of(uncached.generate(prompts, GREEDY, use_tqdm=False))
    assert [outputs[f"r{index}"].outputs[0].token_ids for index in range(3)] == expected


def test_the_callers_list_may_change_while_its_request_runs(fresh, uncached):
    prompt = list(make_prompts(1, seed=15)[0])
    original = list(prompt)
    fresh.engine.add_request("mine", prompt, GREEDY)
    prompt[:] = [4] * len(prompt)
    drain(fresh.engine)
    assert run(fresh, original).outputs[0].token_ids == run(uncached, original).outputs[0].token_ids
    assert run(fresh, prompt).outputs[0].token_ids == run(uncached, prompt).outputs[0].token_ids
