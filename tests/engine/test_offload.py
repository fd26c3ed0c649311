"""Evicted pages go to host memory and come back: the same tokens, and fewer computed anew."""

import logging

import pytest

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.engine.host_pages import HostPages
from miniinfer_jax.engine.runner import Runner
from miniinfer_jax.kv_cache import page_bytes
from tests.engine.cases import GREEDY, SMALL, make_prompts, tokens_of
from tests.engine.test_engine import CompileCounter

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


@pytest.fixture
def always_worth_it(monkeypatch):
    monkeypatch.setattr(Runner, "measure_pages", lambda runner: (0.001, 1.0))


def small_pool(folder, **values):
    return LLM(folder, num_pages=16, **SMALL, **values)


def bits(output):
    return [(one.token_ids, one.logprobs, one.cumulative_logprob) for one in output.outputs], output.prompt_logprobs


def test_a_storm_of_preemptions(folder, llm, always_worth_it):
    """A pool for a fifth of the load: what was preempted finds its pages again, wherever they went."""
    offloading = small_pool(folder, kv_offload_bytes=2**22)
    prompts = make_prompts(10)
    with CompileCounter() as counter:
        outputs = tokens_of(offloading.generate(prompts, LONG, use_tqdm=False))
    assert counter.count == 0
    assert outputs == tokens_of(llm.generate(prompts, LONG, use_tqdm=False))
    stats = offloading.engine.stats()
    assert stats.num_preemptions > 0 and stats.num_evictions > 0
    assert stats.num_page_loads > 0 and stats.num_offloaded_pages > 0
    offloading.engine.check()


def test_evicted_prefixes_come_back(folder, always_worth_it):
    """A prompt that was driven out by others is not computed again, but for its last part."""
    llm = small_pool(folder, kv_offload_bytes=2**22)
    [prompt, *others] = [[5 + number] * 140 for number in range(6)]
    first = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    for other in others:
        llm.generate(other, GREEDY, use_tqdm=False)
    before = llm.engine.stats()
    again = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    after = llm.engine.stats()
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    assert after.num_page_loads - before.num_page_loads >= 7 and again.num_cached_tokens >= 128
    assert llm.reset_prefix_cache() and llm.engine.stats().num_offloaded_pages == 0
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_the_same_bits_in_deterministic_mode(folder, always_worth_it):
    params = [
        SamplingParams(seed=index, max_tokens=60, ignore_eos=True, logprobs=2, prompt_logprobs=1 if index % 3 else None)
        for index in range(9)
    ]
    prompts = make_prompts(9)
    roomy = LLM(folder, deterministic=True, **SMALL)
    offloading = small_pool(folder, deterministic=True, kv_offload_bytes=2**22)
    expected = list(map(bits, roomy.generate(prompts, params, use_tqdm=False)))
    assert list(map(bits, offloading.generate(prompts, params, use_tqdm=False))) == expected
    assert list(map(bits, offloading.generate(prompts[::-1], params[::-1], use_tqdm=False)))[::-1] == expected
    assert offloading.engine.stats().num_page_loads > 10


def test_tenants_stay_apart(folder, always_worth_it):
    llm = small_pool(folder, kv_offload_bytes=2**22)
    prompt = [7] * 140
    llm.generate({"prompt_token_ids": prompt, "cache_salt": "one"}, GREEDY, use_tqdm=False)
    for number in range(3):
        llm.generate([20 + number] * 140, GREEDY, use_tqdm=False)
    other = llm.generate({"prompt_token_ids": prompt, "cache_salt": "two"}, GREEDY, use_tqdm=False)[0]
    same = llm.generate({"prompt_token_ids": prompt, "cache_salt": "one"}, GREEDY, use_tqdm=False)[0]
    assert other.num_cached_tokens == 0 and same.num_cached_tokens >= 128


def test_the_cheaper_way_is_taken(folder, monkeypatch, caplog):
    monkeypatch.setattr(Runner, "measure_pages", lambda runner: (0.002, 0.001))
    with caplog.at_level(logging.INFO):
        llm = small_pool(folder, kv_offload_bytes=2**22)
    assert (
        "comes back from host memory in 2.000 ms and is computed anew in 1.000 ms: nothing is offloaded" in caplog.text
    )
    llm.generate(make_prompts(10), LONG, use_tqdm=False)
    assert llm.engine.stats().num_evictions > 0
    assert llm.engine.stats().num_offloaded_pages == llm.engine.stats().num_page_loads == 0


def test_both_are_measured(folder):
    """Over padding, which leaves no trace."""
    llm = small_pool(folder, kv_offload_bytes=2**22)
    assert all(0 < seconds < 10 for seconds in llm.engine._runner.measure_pages())
    assert not llm.engine._runner._host_pages
    llm.engine.check()


def test_sleep_keeps_what_is_in_host_memory(folder, always_worth_it):
    llm = small_pool(folder, kv_offload_bytes=2**22)
    first = tokens_of(llm.generate([7] * 140, GREEDY, use_tqdm=False))
    for number in range(3):
        llm.generate([20 + number] * 140, GREEDY, use_tqdm=False)
    llm.sleep()
    llm.wake_up()
    again = llm.generate([7] * 140, GREEDY, use_tqdm=False)
    assert tokens_of(again) == first and again[0].num_cached_tokens >= 128


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kv_offload_bytes": -1}, "kv_offload_bytes is -1"),
        ({"kv_offload_bytes": 1.5}, "kv_offload_bytes is 1.5"),
        ({"kv_offload_bytes": 100}, "kv_offload_bytes is 100, and a page takes 4096"),
        ({"kv_offload_bytes": 2**20, "enable_prefix_caching": False}, "set enable_prefix_caching=True"),
    ],
)
def test_bad_values(folder, values, words):
    with pytest.raises(ValueError, match=words):
        small_pool(folder, **values)


def test_the_size_is_kept_to(folder, always_worth_it):
    size = page_bytes(LLM(folder, **SMALL).model_config, 16, "float32")
    llm = small_pool(folder, kv_offload_bytes=3 * size + size // 2)
    llm.generate(make_prompts(10), LONG, use_tqdm=False)
    assert llm.engine.stats().num_offloaded_pages == 3
    assert len(llm.engine._runner._host_pages) == 3


def test_host_pages_give_way_in_order_of_use():
    pages = HostPages(2)
    assert [pages.store(key) for key in (b"a", b"b")] == [0, 1]
    assert pages.find(b"a") is None  # stored by the plan under way
    pages.end_plan()
    pages.begin_plan()
    assert pages.store(b"a") is None and pages.find(b"a") == 0
    assert pages.store(b"c") == 1 and pages.find(b"b") is None  # b went unused for longest
    pages.drop_fresh()
    assert pages.find(b"c") is None and len(pages) == 1 and pages.store(b"d") == 1
    pages.clear()
    assert len(pages) == 0 and HostPages(0).store(b"a") is None
