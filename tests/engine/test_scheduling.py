"""Policies and the target between tokens through the whole engine: who goes first changes, what comes out doesn't."""

import json

import pytest

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.batch_file import run_batch_file
from miniinfer_jax.engine.policies import POLICIES
from tests.engine.cases import GREEDY, SMALL, make_prompts, tokens_of

SCHEDULING = {"priority": [3, 1, 2] * 3 + [0], "tenant": list("aaaaaaaabb"), "expected_output_len": 20}


@pytest.fixture(scope="module", params=POLICIES)
def policy_llm(folder, request):
    options = {"multi_queue": {"quantum": 32}, "fair": {"weights": {"b": 2.5}}}.get(request.param)
    return LLM(folder, num_pages=20, scheduling_policy=request.param, policy_options=options, **SMALL)


def test_every_policy_gives_the_same_tokens_with_few_pages(policy_llm, expected):
    outputs = policy_llm.generate(make_prompts(10), GREEDY, use_tqdm=False, **SCHEDULING)
    assert tokens_of(outputs) == expected
    policy_llm.engine.check()


def test_every_policy_streams_the_same_tokens(policy_llm, expected):
    streamed = {index: [] for index in range(10)}
    for delta in policy_llm.stream(make_prompts(10), GREEDY, **SCHEDULING):
        streamed[delta.prompt_index] += delta.token_ids
    assert list(streamed.values()) == expected


def order_of_finishing(llm: LLM, requests: list[dict]) -> list[str]:
    for index, request in enumerate(requests):
        llm.engine.add_request(str(index), [5, 6, 7], GREEDY, streams=False, **request)
    order = []
    while llm.engine.has_unfinished_requests():
        order += [output.request_id for output in llm.engine.step()]
    return order


def test_the_engine_hands_the_policy_what_the_user_said(folder):
    single = {**SMALL, "max_num_seqs": 1}
    by_priority = LLM(folder, scheduling_policy="priority", **single)
    assert order_of_finishing(by_priority, [{"priority": 1}, {"priority": 2}, {"priority": -1}]) == ["2", "0", "1"]
    by_length = LLM(folder, scheduling_policy="sjf", **single)
    requests = [{"expected_output_len": 9}, {}, {"expected_output_len": 8}]
    assert order_of_finishing(by_length, requests) == ["2", "0", "1"]
    by_tenant = LLM(folder, scheduling_policy="fair", **single)
    requests = [{"tenant": "a"}, {"tenant": "a"}, {"tenant": "b"}]
    assert order_of_finishing(by_tenant, requests) == ["0", "2", "1"]


def test_all_n_sequences_of_a_request_have_its_priority(folder):
    llm = LLM(folder, scheduling_policy="priority", **{**SMALL, "max_num_seqs": 2})
    several = SamplingParams(n=2, seed=1, max_tokens=30, ignore_eos=True)
    llm.engine.add_request("low", [5, 6], several, priority=1, streams=False)
    for _ in range(4):
        llm.engine.step()
    llm.engine.add_request("high", [5, 6], several, priority=0, streams=False)
    order = []
    while llm.engine.has_unfinished_requests():
        order += [output.request_id for output in llm.engine.step()]
    assert order == ["high", "low"]
    assert llm.engine.stats().num_preemptions == 2


def sizes_beside_decoding(llm: LLM, monkeypatch, clock) -> tuple[list[int], list]:
    """Tokens of each step that decodes and computes prompts, while the engine's clock is `clock`; and the outputs."""
    plans, original = [], llm.engine._scheduler.schedule

    def schedule():
        plans.append(original())
        return plans[-1]

    monkeypatch.setattr(llm.engine._scheduler, "schedule", schedule)
    monkeypatch.setattr("miniinfer_jax.engine.llm_engine.time.monotonic", clock)
    outputs = llm.generate([prompt * 2 for prompt in make_prompts(10, longest=100)], GREEDY, use_tqdm=False)
    kinds = [{chunk.is_decode for chunk in plan.chunks} for plan in plans]
    return [plan.num_tokens for plan, kind in zip(plans, kinds, strict=True) if len(kind) == 2], outputs


def test_the_target_cuts_prompts_smaller_and_changes_no_token(folder, monkeypatch):
    ticks = iter(range(1_000_000))  # each look at the clock is a second later than the one before
    arguments = {**SMALL, "max_num_batched_tokens": 256}
    free, tight = LLM(folder, **arguments), LLM(folder, target_itl_ms=100, **arguments)
    free_sizes, free_outputs = sizes_beside_decoding(free, monkeypatch, lambda: float(next(ticks)))
    tight_sizes, tight_outputs = sizes_beside_decoding(tight, monkeypatch, lambda: float(next(ticks)))
    assert tokens_of(tight_outputs) == tokens_of(free_outputs)
    assert max(free_sizes) > 64
    assert max(tight_sizes[2:]) <= 16 and len(tight_sizes) > len(free_sizes)


def test_a_target_that_is_kept_costs_nothing(folder, monkeypatch):
    ticks = iter(range(1_000_000))
    llm = LLM(folder, target_itl_ms=100, **{**SMALL, "max_num_batched_tokens": 256})
    sizes, _ = sizes_beside_decoding(llm, monkeypatch, lambda: next(ticks) * 1e-3)
    assert max(sizes) > 64


@pytest.mark.parametrize(
    ("scheduling", "words"),
    [
        ({"priority": "high"}, "priority is 'high'; it must be an integer"),
        ({"priority": 1.5}, "priority is 1.5"),
        ({"priority": True}, "priority is True"),
        ({"priority": [1, 2, 3]}, "2 prompts but 3 of priority"),
        ({"tenant": 7}, "tenant is 7; it must be a string"),
        ({"expected_output_len": 0}, "expected_output_len is 0; it must be a positive integer"),
    ],
)
def test_what_no_policy_can_read_is_refused(llm, scheduling, words):
    with pytest.raises(ValueError, match=words):
        llm.generate([[5], [6]], GREEDY, use_tqdm=False, **scheduling)
    with pytest.raises(ValueError, match=words):
        llm.stream([[5], [6]], GREEDY, **scheduling)
    if not isinstance(scheduling.get("priority"), list):
        with pytest.raises(ValueError, match=words):
            llm.engine.add_request("bad", [5], GREEDY, **scheduling)
    assert not llm.engine.has_requests()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scheduling_policy": "lifo"}, "'lifo' is not known; known: fcfs, sjf, priority, fair, multi_queue"),
        ({"scheduling_policy": "fair", "policy_options": {"weights": {"a": -1}}}, "weight of tenant 'a' is -1"),
        ({"policy_options": {"weights": {"a": 1}}}, "'fcfs' has no option 'weights'"),
        ({"policy_options": ["weights"]}, "policy_options is \\['weights'\\]; give options by name"),
        ({"target_itl_ms": True}, "target_itl_ms is True"),
        ({"target_itl_ms": 0}, "target_itl_ms is 0; it must be a positive number"),
        ({"target_itl_ms": "20"}, "target_itl_ms is '20'"),
        ({"target_itl_ms": 20, "deterministic": True}, "drop one of the two"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(folder, monkeypatch, arguments, words):
    monkeypatch.setattr("miniinfer_jax.llm.load_params", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(ValueError, match=words):
        LLM(folder, **SMALL, **arguments)


def test_lines_of_a_batch_file_name_priority_and_tenant(folder, tmp_path):
    lines = [
        {"prompt_token_ids": [5], "priority": 2, "tenant": "a", "expected_output_len": 4},
        {"prompt_token_ids": [6], "priority": 1},
        {"prompt_token_ids": [7], "priority": "high"},
    ]
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def open_llm() -> LLM:
        return LLM(folder, scheduling_policy="priority", **{**SMALL, "max_num_seqs": 1})

    run_batch_file(open_llm, source, results, {"max_tokens": 4, "temperature": 0}, window=3, use_tqdm=False)
    answers = [json.loads(line) for line in results.read_text().splitlines()]
    assert [answer["line"] for answer in answers] == [3, 2, 1]
    assert "priority is 'high'" in answers[0]["error"]["message"]
