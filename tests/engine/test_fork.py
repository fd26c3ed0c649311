"""A running request continued once more: the same text so far, draws of its own, and nothing computed twice."""

import pytest

from miniinfer_jax import LLM, SamplingParams
from tests.engine.cases import GREEDY, SMALL, make_prompts
from tests.engine.test_prefix_caching import drain, run

PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module", params=[True, False], ids=["cached", "uncached"])
def small_llm(request, folder):
    return LLM(folder, enable_prefix_caching=request.param, num_pages=64, **SMALL)


@pytest.fixture
def engine(small_llm):
    assert small_llm.reset_prefix_cache()
    yield small_llm.engine
    assert not small_llm.engine.has_unfinished_requests()
    small_llm.engine.check()
    stats = small_llm.engine.stats()
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages


def step_until(engine, request_id: str, num_tokens: int) -> list[int]:
    """The tokens of the output that has at least num_tokens."""
    while True:
        for output in engine.step():
            if output.request_id == request_id and len(output.outputs[0].token_ids) >= num_tokens:
                return output.outputs[0].token_ids


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 33])
def test_a_fork_goes_on_as_a_request_with_these_tokens_would(engine, llm, num_tokens):
    """Drawing depends on seed and position alone: a prompt that holds the tokens so far shows what must come."""
    prompt = make_prompts(1, seed=20, longest=40)[0]
    engine.add_request("parent", prompt, PARAMS)
    said = step_until(engine, "parent", num_tokens)
    engine.fork("parent", "child", seed=77)
    outputs = drain(engine)
    parent, child = outputs["parent"].outputs[0], outputs["child"].outputs[0]
    assert parent.token_ids == run(llm, prompt, PARAMS).outputs[0].token_ids
    assert child.token_ids[: len(said)] == said
    assert child.token_ids != parent.token_ids
    rest = SamplingParams(temperature=1.0, seed=77, max_tokens=40 - len(said), ignore_eos=True)
    assert child.token_ids[len(said) :] == run(llm, prompt + said, rest).outputs[0].token_ids
    assert len(child.logprobs) == len(child.token_ids) == 40
    assert child.logprobs[: len(said)] == parent.logprobs[: len(said)]
    drawn = [entry[token].logprob for entry, token in zip(child.logprobs, child.token_ids, strict=True)]
    assert child.cumulative_logprob == pytest.approx(sum(drawn))


def test_a_greedy_fork_says_the_same(engine):
    prompt = make_prompts(1, seed=21)[0]
    engine.add_request("parent", prompt, GREEDY)
    step_until(engine, "parent", 5)
    engine.fork("parent", "child")
    outputs = drain(engine)
    assert outputs["child"].outputs[0].token_ids == outputs["parent"].outputs[0].token_ids


def test_a_fork_shares_the_full_pages_and_computes_one_token(engine):
    prompt = make_prompts(1, seed=22, longest=40)[0] * 4  # several pages
    engine.add_request("parent", prompt, PARAMS)
    said = step_until(engine, "parent", 3)
    before = engine.stats()
    engine.fork("parent", "child")
    plans, schedule = [], engine._scheduler.schedule
    engine._scheduler.schedule = lambda: plans.append(schedule()) or plans[-1]
    engine.step()
    engine._scheduler.schedule = schedule
    num_known = len(prompt) + len(said)
    [chunk] = [chunk for chunk in plans[0].chunks if not chunk.is_decode]
    assert (chunk.start, chunk.length) == (num_known - 1, 1)
    stats = engine.stats()
    used = [one.num_pages - one.num_free_pages - one.num_cached_pages for one in (before, stats)]
    assert used[1] - used[0] <= 2
    drain(engine)


def test_forks_of_forks_at_any_time(engine, llm):
    """Also of requests that wait, are in the middle of their prompt, or have just been forked."""
    prompt = make_prompts(1, seed=23)[0] + [5] * 70  # more than a step
    engine.add_request("a", prompt, PARAMS)
    engine.fork("a", "b", seed=3)
    engine.step()
    engine.fork("a", "c", seed=3)
    step_until(engine, "a", 10)
    engine.fork("a", "d", seed=3)
    engine.fork("d", "e", seed=3)
    for name in "fghij":
        engine.step()
        engine.fork("a", name, seed=3)
    outputs = drain(engine)
    expected = run(llm, prompt, PARAMS).outputs[0].token_ids
    assert len(outputs) == 10
    assert all(output.outputs[0].token_ids == expected for output in outputs.values())


def test_a_fork_outlives_its_parent(engine, llm):
    prompt = make_prompts(1, seed=24)[0]
    engine.add_request("parent", prompt, PARAMS)
    step_until(engine, "parent", 9)
    engine.fork("parent", "child", seed=3)
    engine.abort("parent")
    assert drain(engine)["child"].outputs[0].token_ids == run(llm, prompt, PARAMS).outputs[0].token_ids


def test_a_fork_of_several_samples_forks_each(engine, llm):
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True, prompt_logprobs=0)
    prompt = make_prompts(1, seed=25)[0]
    engine.add_request("parent", prompt, params)
    step_until(engine, "parent", 4)
    engine.fork("parent", "child", seed=3)
    outputs = drain(engine)
    texts = [[completion.token_ids for completion in outputs[name].outputs] for name in ("parent", "child")]
    assert texts[0] == texts[1] == [one.token_ids for one in run(llm, prompt, params).outputs]
    assert outputs["child"].prompt_logprobs == outputs["parent"].prompt_logprobs
    assert len(outputs["child"].prompt_logprobs) == len(prompt)


def test_penalties_count_what_was_said_before_the_fork(engine, llm):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, frequency_penalty=2.0, presence_penalty=1.0)
    prompt = make_prompts(1, seed=26)[0]
    engine.add_request("parent", prompt, params)
    step_until(engine, "parent", 7)
    engine.fork("parent", "child")
    outputs = drain(engine)
    expected = run(llm, prompt, params).outputs[0].token_ids
    assert [outputs[name].outputs[0].token_ids for name in ("parent", "child")] == [expected] * 2


@pytest.mark.parametrize("when", ["never", "finished", "aborted"])
def test_a_request_that_does_not_run_cannot_be_forked(engine, when):
    if when != "never":
        engine.add_request("gone", [4, 5, 6], GREEDY)
        drain(engine) if when == "finished" else engine.abort("gone")
    with pytest.raises(ValueError, match="'gone' cannot be forked: it has ended, or was never added"):
        engine.fork("gone", "child")
    assert not engine.has_requests()


def test_an_id_in_use_and_a_bad_seed_are_refused(engine):
    engine.add_request("parent", [4, 5, 6], GREEDY)
    with pytest.raises(ValueError, match="'parent' is in use"):
        engine.fork("parent", "parent")
    for seed in (-1, 2**32, 1.5, True, "7"):
        with pytest.raises(ValueError, match="seed is"):
            engine.fork("parent", "child", seed=seed)
    assert list(drain(engine)) == ["parent"]


def test_llm_fork_makes_up_ids(llm):
    llm.engine.add_request("mine", [4, 5, 6], PARAMS)
    llm.engine.step()
    names = [llm.fork("mine"), llm.fork("mine", seed=4), llm.fork("mine", "named")]
    assert len(set(names)) == 3 and names[2] == "named"
    assert drain(llm.engine).keys() == {"mine", *names}


def test_the_text_of_a_fork_is_that_of_its_tokens():
    llm = LLM("demo", max_num_seqs=4, max_num_batched_tokens=64, use_tqdm=False)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=30, stop=["\n\n\n"])
    llm.engine.add_request("parent", llm.tokenizer.encode("Once upon a time"), params)
    step_until(llm.engine, "parent", 8)
    llm.fork("parent", "child", seed=5)
    for output in drain(llm.engine).values():
        completion = output.outputs[0]
        assert completion.text == llm.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_fork_of_a_fork_that_starts_with_its_line_waits_for_what_the_step_fills(folder, enable_prefix_caching):
    """All pages are lost, and three generations start in one plan: the second shares what the first is to fill."""
    sizes = {**SMALL, "max_num_seqs": 3, "max_num_batched_tokens": 64}
    llm = LLM(folder, num_pages=40, enable_prefix_caching=enable_prefix_caching, **sizes)
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompt = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 5, 3, 2, 9, 8, 6, 4, 10]
    expected = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    assert llm.reset_prefix_cache()
    engine.add_request("other", prompt[::-1], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    engine.add_request("first", prompt, params)
    step_until(engine, "first", 8)
    engine.fork("first", "second")
    for _ in range(3):
        engine.step()
    engine.fork("second", "third")  # finds no slot, and ends inside a page that the others go on to fill
    step_until(engine, "second", 16)
    engine.abort("other")
    engine.start_over(40, 64)
    outputs = drain(engine)
    assert [outputs[name].outputs[0].token_ids for name in ("first", "second", "third")] == [expected] * 3
