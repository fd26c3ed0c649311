"""Rewinding a request: it forgets tokens, gives back their pages, and goes on as if it had never drawn them."""

import pytest

from miniinfer_jax import LLM, SamplingParams
from tests.engine.cases import GREEDY, SMALL, make_prompts

pytestmark = pytest.mark.usefixtures("pages_come_back")

PENALIZED = SamplingParams(
    temperature=0.7,
    seed=3,
    max_tokens=40,
    ignore_eos=True,
    presence_penalty=1.0,
    frequency_penalty=0.7,
    repetition_penalty=1.2,
    logprobs=2,
)


def finish(engine, request_id):
    last = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            last = output if output.request_id == request_id else last
    assert last is not None
    return last


def start(engine, params, num_tokens, prompt=None):
    """A request "r" that has at least num_tokens outputs, read by the host."""
    engine.add_request("r", prompt or make_prompts(2)[1], params)
    while True:
        for output in engine.step():
            if len(output.outputs[0].token_ids) >= num_tokens:
                return


@pytest.mark.parametrize("params", [GREEDY, PENALIZED], ids=["greedy", "penalties"])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9, 16])
def test_the_same_tokens_are_drawn_again(llm, params, num_tokens):
    """Were the penalties' counts not taken back too, other tokens would follow."""
    expected = llm.generate(make_prompts(2)[1], params, use_tqdm=False)[0].outputs[0]
    start(llm.engine, params, 16)
    output = llm.engine.rewind("r", num_tokens)
    kept = len(output.outputs[0].token_ids)
    assert 16 <= kept + num_tokens <= 18 and output.outputs[0].token_ids == expected.token_ids[:kept]
    again = finish(llm.engine, "r").outputs[0]
    assert again.token_ids == expected.token_ids
    if params.logprobs is not None:
        assert len(again.logprobs) == len(again.token_ids)
        assert again.logprobs[:kept] == expected.logprobs[:kept]
        assert again.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-4)


def test_pages_are_given_back(llm):
    start(llm.engine, GREEDY, 3, prompt=[5] * 32)
    llm.engine.rewind("r", 0)
    before = llm.engine.stats().num_free_pages
    llm.engine.rewind("r", 3)
    assert llm.engine.stats().num_free_pages == before + 1  # the pages of the prompt's 32 tokens stay
    llm.engine.check()
    finish(llm.engine, "r")


def test_to_the_prompt_again_and_again_among_others(llm, expected):
    prompts = make_prompts(10)
    for index, prompt in enumerate(prompts):
        llm.engine.add_request(f"r{index}", prompt, GREEDY)
    got, num_rewinds = {}, 0
    while llm.engine.has_unfinished_requests():
        for output in llm.engine.step():
            got[output.request_id] = output.outputs[0].token_ids
        if num_rewinds < 6 and llm.engine.knows("r1") and len(got.get("r1", [])) > 3 * num_rewinds:
            num_drawn = len(llm.engine.rewind("r1", 0).outputs[0].token_ids)
            assert llm.engine.rewind("r1", num_drawn).outputs[0].token_ids == []
            num_rewinds += 1
    assert num_rewinds == 6
    assert [got[f"r{index}"] for index in range(10)] == expected


def test_another_seed_draws_other_tokens(llm):
    params = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
    start(llm.engine, params, 12)
    kept = llm.engine.rewind("r", 6, seed=2).outputs[0].token_ids
    first = finish(llm.engine, "r").outputs[0].token_ids
    prompt = make_prompts(2)[1]
    other = SamplingParams(seed=2, max_tokens=30 - len(kept), ignore_eos=True)
    assert first[: len(kept)] == kept
    assert first[len(kept) :] == llm.generate([prompt + kept], other, use_tqdm=False)[0].outputs[0].token_ids
    assert first != llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids


def test_all_sequences_of_a_request(llm):
    params = SamplingParams(seed=1, n=3, max_tokens=30, ignore_eos=True)
    expected = llm.generate(make_prompts(2)[1], params, use_tqdm=False)[0]
    start(llm.engine, params, 12)
    rewound = llm.engine.rewind("r", 10)
    assert all(len(one.token_ids) < 6 for one in rewound.outputs)
    assert [one.token_ids for one in finish(llm.engine, "r").outputs] == [one.token_ids for one in expected.outputs]


def test_while_it_waits_after_a_preemption(folder):
    engine = LLM(folder, num_pages=16, **SMALL).engine
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    prompts = make_prompts(3, longest=90, seed=3)
    alone = LLM(folder, **SMALL).generate(prompts, long, use_tqdm=False)
    for index, prompt in enumerate(prompts):
        engine.add_request(f"r{index}", prompt, long)
    while not engine.stats().num_preemptions:
        engine.step()
    assert engine.stats().num_waiting
    engine.rewind("r2", 5)
    engine.check()
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    assert [last[f"r{index}"] for index in range(3)] == [output.outputs[0].token_ids for output in alone]


def test_text_is_taken_back_and_stop_strings_are_found_again():
    demo = LLM("demo", max_num_seqs=4, max_num_batched_tokens=64, use_tqdm=False)
    params = SamplingParams(temperature=0, max_tokens=60, stop=["."], include_stop_str_in_output=True)
    expected = demo.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0]
    assert expected.finish_reason == "stop"
    demo.engine.add_request("r", demo.tokenizer.encode("Once upon a time"), params, "Once upon a time")
    for _ in range(8):
        demo.engine.step()
    before = demo.engine.rewind("r", 0).outputs[0]
    after = demo.engine.rewind("r", 4).outputs[0]
    assert before.text.startswith(after.text) and len(after.text) < len(before.text)
    last = finish(demo.engine, "r").outputs[0]
    assert (last.text, last.token_ids, last.stop_reason) == (expected.text, expected.token_ids, ".")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("r", 1000), r"has drawn \d+ tokens, and taking back 1000 would go past its prompt: rewind by \d+ at most"),
        (("r", -1), "num_tokens is -1; it must be an integer, 0 or more"),
        (("r", 1.0), "num_tokens is 1.0"),
        (("unknown", 1), "request 'unknown' is not running or waiting"),
    ],
)
def test_refusals_change_nothing(llm, arguments, words):
    expected = llm.generate(make_prompts(2)[1], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    start(llm.engine, GREEDY, 5)
    with pytest.raises(ValueError, match=words):
        llm.engine.rewind(*arguments)
    with pytest.raises(ValueError, match="seed is -1"):
        llm.engine.rewind("r", 1, seed=-1)
    assert finish(llm.engine, "r").outputs[0].token_ids == expected
    with pytest.raises(ValueError, match="request 'r' is not running"):
        llm.engine.rewind("r", 1)
