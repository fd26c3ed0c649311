"""A device that runs out of memory, by injection: the engine goes on with less, and no request loses a token."""

import logging

import jax
import pytest

from miniinfer_jax import LLM, SamplingParams, kv_cache
from miniinfer_jax.engine.buckets import RaggedBucket
from miniinfer_jax.engine.runner import StepInFlight
from miniinfer_jax.replay import replay
from tests.engine.cases import GREEDY, SMALL, make_prompts, tokens_of

OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")
MIXED = [GREEDY, SamplingParams(seed=1, max_tokens=30, frequency_penalty=1.0, ignore_eos=True)]


class Failing:
    """Programs of a runner that fail at chosen calls, and take with them the buffers that they were given to update."""

    def __init__(self, runner, when):
        self.runner, self.when, self.num_calls, self.num_failures = runner, when, 0, 0
        self.programs = dict(runner._programs)
        for key in [*runner._buckets.ragged, *runner._buckets.decode]:
            runner._programs[key] = self._wrap(key)

    def _wrap(self, key):
        def call(params, cache, state, *rest):
            self.num_calls += 1
            if self.when(self.num_calls, key):
                self.num_failures += 1
                for array in jax.tree.leaves((cache, state)):
                    array.delete()
                raise OUT_OF_MEMORY
            return self.programs[key](params, cache, state, *rest)

        return call


@pytest.fixture
def engine(folder):
    return LLM(folder, num_pages=60, **SMALL).engine


def finish(engine):
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step() if output.finished}
    engine.check()
    return {name: output.outputs[0].token_ids for name, output in last.items()}


def add_all(engine, num_requests=8):
    for index, prompt in enumerate(make_prompts(num_requests)):
        engine.add_request(f"r{index}", prompt, MIXED[index % 2])


@pytest.fixture(scope="module")
def undisturbed(llm):
    add_all(llm.engine)
    return finish(llm.engine)


def test_a_large_step_fails_and_smaller_ones_are_run(engine, undisturbed, caplog):
    """The workspace of 64 tokens does not fit: from then on a step has 16."""
    failing = Failing(engine._runner, lambda number, key: isinstance(key, RaggedBucket) and key.num_tokens > 16)
    add_all(engine)
    with caplog.at_level(logging.WARNING):
        assert finish(engine) == undisturbed
    assert failing.num_failures == engine.stats().num_memory_failures == 1
    assert engine.stats().num_pages == 60 and engine._scheduler.max_num_batched_tokens == 16
    assert "ran out of memory" in caplog.text and "60 pages, 16 tokens a step" in caplog.text


@pytest.mark.parametrize("number", [1, 2, 5, 12, 30])
def test_any_step_may_fail(engine, undisturbed, number):
    add_all(engine)
    failing = Failing(engine._runner, lambda call, key: call == number)
    assert finish(engine) == undisturbed
    assert failing.num_failures == engine.stats().num_memory_failures == 1


def test_decoding_fails_and_the_pool_shrinks(engine, undisturbed):
    add_all(engine)
    Failing(engine._runner, lambda call, key: not isinstance(key, RaggedBucket))
    assert finish(engine) == undisturbed  # the programs compiled for the smaller pool are whole ones
    stats = engine.stats()
    assert stats.num_memory_failures == 1 and stats.num_pages == stats.num_free_pages + stats.num_cached_pages == 48
    assert engine.device_arrays_bytes()["pages"] == 48 * 2 * 16 * 2 * 2 * 8 * 4


def test_results_that_never_come(engine, undisturbed, monkeypatch):
    """The device fails behind the host's back: what was dispatched after that is lost as well."""
    original, reads = StepInFlight.token_ids, []

    def token_ids(self):
        reads.append(self)
        if len(reads) >= 7 and self is reads[6]:
            raise OUT_OF_MEMORY
        return original(self)

    monkeypatch.setattr(StepInFlight, "token_ids", token_ids)
    add_all(engine)
    assert finish(engine) == undisturbed
    assert engine.stats().num_memory_failures == 1


def test_what_is_recomputed_keeps_its_output(engine, undisturbed):
    """A stream never goes back: tokens that were given stay."""
    add_all(engine)
    Failing(engine._runner, lambda call, key: call in (9, 20))
    shown = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = output.outputs[0].token_ids
            assert tokens[: len(shown.get(output.request_id, []))] == shown.get(output.request_id, [])
            shown[output.request_id] = tokens
    assert shown == undisturbed


def test_where_nothing_smaller_helps_the_error_is_raised_and_requests_stay(folder, undisturbed):
    engine = LLM(folder, num_pages=11, **SMALL).engine
    add_all(engine)
    failing = Failing(engine._runner, lambda call, key: True)
    original, engine._runner._compile_all = engine._runner._compile_all, lambda use_tqdm: engine._runner._programs
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        for _ in range(20):
            engine.step()
    assert 1 <= engine.stats().num_memory_failures < 20
    assert engine.has_requests() and engine.stats().num_pages == 10  # 149 tokens and 20 of 16 a page, at most
    engine._runner._compile_all = original
    failing.when = lambda call, key: False
    engine.start_over(12, 64)
    assert finish(engine) == undisturbed


def test_other_errors_are_not_taken_for_it(engine):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    add_all(engine)
    engine._runner._programs = dict.fromkeys(engine._runner._programs, fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        engine.step()
    assert engine.stats().num_memory_failures == 0


def test_a_pool_that_does_not_fit_at_the_start_shrinks(folder, monkeypatch, caplog, expected):
    create, asked = kv_cache.create, []

    def create_some(config, num_pages, page_size, dtype):
        asked.append(num_pages)
        if num_pages > 70:
            raise OUT_OF_MEMORY
        return create(config, num_pages, page_size, dtype)

    monkeypatch.setattr(kv_cache, "create", create_some)
    with caplog.at_level(logging.WARNING):
        llm = LLM(folder, num_pages=100, **SMALL)
    assert asked == [100, 80, 64] and "64 pages, not 80" in caplog.text
    stats = llm.engine.stats()
    assert stats.num_pages == 64 and stats.num_memory_failures == 2
    assert tokens_of(llm.generate(make_prompts(10), GREEDY, use_tqdm=False)) == expected
    monkeypatch.setattr(kv_cache, "create", lambda *_: (_ for _ in ()).throw(OUT_OF_MEMORY))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        LLM(folder, num_pages=100, **SMALL)


def test_a_recorded_run_repeats_its_recovery(folder, tmp_path, undisturbed):
    engine = LLM(folder, record=tmp_path / "log.jsonl", num_pages=60, **SMALL).engine
    add_all(engine)
    Failing(engine._runner, lambda call, key: call == 9)
    assert finish(engine) == undisturbed
    assert replay(tmp_path / "log.jsonl").stats().num_generated_tokens == engine.stats().num_generated_tokens
