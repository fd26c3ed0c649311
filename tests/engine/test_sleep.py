"""Sleeping gives the device's memory back and loses nothing: requests go on with the same tokens."""

import gc

import jax
import pytest

from miniinfer_jax import LLM, SamplingParams
from tests.engine.cases import GREEDY, SMALL, make_prompts, tokens_of
from tests.engine.test_engine import CompileCounter

pytestmark = pytest.mark.usefixtures("pages_come_back")
MIXED = [
    GREEDY,
    SamplingParams(seed=1, max_tokens=30, presence_penalty=1.0, frequency_penalty=0.5, logprobs=1, ignore_eos=True),
    SamplingParams(seed=2, n=2, max_tokens=25, top_p=0.9, bad_words=None, min_tokens=5, prompt_logprobs=1),
]


def device_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def finish(engine):
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step() if output.finished}
    return {name: [one.token_ids for one in output.outputs] for name, output in last.items()}


def add_all(engine):
    for index, prompt in enumerate(make_prompts(6)):
        engine.add_request(f"r{index}", prompt, MIXED[index % 3])


@pytest.fixture(scope="module")
def uninterrupted(llm):
    add_all(llm.engine)
    return finish(llm.engine)


@pytest.mark.parametrize("keep_cache", [True, False])
@pytest.mark.parametrize("num_steps", [0, 1, 4, 12])
def test_requests_go_on_after_a_sleep(llm, uninterrupted, keep_cache, num_steps):
    engine = llm.engine
    add_all(engine)
    for _ in range(num_steps):
        engine.step()
    num_running, num_preemptions = engine.stats().num_running, engine.stats().num_preemptions
    with CompileCounter() as counter:
        llm.sleep(keep_cache=keep_cache)
        assert engine.is_sleeping
        assert engine.stats().num_running == (num_running if keep_cache else 0)
        llm.sleep(keep_cache=keep_cache)  # again: nothing to do
        engine.add_request("late", [5, 6, 7], GREEDY)
        llm.wake_up()
        llm.wake_up()
        assert not engine.is_sleeping
        tokens = finish(engine)
    assert counter.count == 0
    assert tokens.pop("late") and tokens == uninterrupted
    assert engine.stats().num_preemptions == num_preemptions + (0 if keep_cache else num_running)


def test_the_memory_of_the_device_is_free(folder):
    before = device_bytes()
    llm = LLM(folder, num_pages=40, **SMALL)
    expected = tokens_of(llm.generate(make_prompts(3), GREEDY, use_tqdm=False))
    awake = device_bytes()
    sizes = llm.engine.device_arrays_bytes()
    assert awake - before >= sum(sizes.values()) > 10_000
    for keep_cache in (True, False):
        llm.sleep(keep_cache=keep_cache)
        assert device_bytes() - before < 1000
        assert set(llm.engine.device_arrays_bytes().values()) == {0}
        llm.wake_up()
        assert abs(device_bytes() - awake) < 1000 and llm.engine.device_arrays_bytes() == sizes
        assert tokens_of(llm.generate(make_prompts(3), GREEDY, use_tqdm=False)) == expected


def test_what_needs_the_device_is_refused(llm, expected):
    engine = llm.engine
    snapshot = engine.snapshot()
    llm.sleep()
    calls = (
        lambda: llm.generate(make_prompts(1), GREEDY, use_tqdm=False),
        lambda: llm.generate(make_prompts(2), GREEDY, use_tqdm=False),
        lambda: next(llm.stream(make_prompts(1), GREEDY)),
        engine.step,
        engine.snapshot,
        lambda: engine.restore(snapshot),
        lambda: engine.rewind("r", 1),
        lambda: engine.start_over(64, 64),
    )
    for call in calls:
        with pytest.raises(ValueError, match="sleeps.*call wake_up"):
            call()
    assert not engine.has_requests()
    engine.add_request("r", [5, 6, 7], GREEDY)
    assert engine.abort("r").outputs[0].finish_reason == "abort"
    llm.wake_up()
    assert tokens_of(llm.generate(make_prompts(10), GREEDY, use_tqdm=False)) == expected
