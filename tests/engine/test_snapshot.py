"""A snapshot, taken at any step and taken up anywhere: the same outputs as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.engine.snapshot import Snapshot
from tests.engine.cases import SMALL, make_prompts
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
# Every kind of state that a request can have: penalties count, bad words and minimum lengths look back, scores add up.
PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=5, max_tokens=33, ignore_eos=True, logprobs=3, prompt_logprobs=2),
    SamplingParams(temperature=0, presence_penalty=1.5, frequency_penalty=1.0, repetition_penalty=1.3, max_tokens=30),
    SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=25, min_tokens=10, top_k=20, stop_token_ids=[9, 10]),
    SamplingParams(
        temperature=0.8, seed=4, top_p=0.9, logit_bias={7: 3.0}, allowed_token_ids=list(range(5, 60)), max_tokens=28
    ),
]


def add_all(engine, num_requests=8):
    for index, prompt in enumerate(make_prompts(num_requests)):
        engine.add_request(f"r{index}", prompt, PARAMS[index % len(PARAMS)], streams=index % 2 == 0)


def essence(output):
    """All of an output that must be the same; texts too."""
    return (
        [(one.token_ids, one.text, one.finish_reason, one.stop_reason, one.logprobs) for one in output.outputs],
        output.prompt_logprobs,
    )


def finish(engine):
    """The last output of every request that ends from here on."""
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step() if output.finished}
    engine.check()
    assert engine.stats().num_free_pages + engine.stats().num_cached_pages == engine.stats().num_pages
    return last


def run_steps(engine, num_steps):
    last = {}
    for _ in range(num_steps):
        last |= {output.request_id: output for output in engine.step() if output.finished}
    return last


def same_tokens(outputs):
    """Tokens and ends, where log-probabilities may differ in the last bits: other chunks are other programs."""
    return {
        request_id: [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in output.outputs]
        for request_id, output in outputs.items()
    }


@pytest.fixture(scope="module")
def uninterrupted(folder):
    llm = LLM(folder, **SMALL)
    add_all(llm.engine)
    return finish(llm.engine)


@pytest.fixture(scope="module")
def other(folder):
    """Pages of another size, and another number of them."""
    return LLM(folder, page_size=8, num_pages=150, **SMALL)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 7, 20, 45])
def test_taken_up_at_any_step_by_engines_of_other_sizes(folder, llm, other, uninterrupted, num_steps):
    add_all(llm.engine)
    before = run_steps(llm.engine, num_steps)
    snapshot = llm.engine.snapshot()
    undisturbed = before | finish(llm.engine)
    assert same_tokens(undisturbed) == same_tokens(uninterrupted)  # taking it changes nothing
    for engine in (llm.engine, other.engine):
        assert engine.restore(snapshot) == [state.request_id for state in snapshot.requests]
        assert same_tokens(before | finish(engine)) == same_tokens(uninterrupted)


def test_what_does_not_fit_waits_and_is_computed_anew(folder, llm, uninterrupted):
    small = LLM(folder, num_pages=20, **SMALL).engine
    add_all(llm.engine)
    before = run_steps(llm.engine, 30)
    snapshot = llm.engine.snapshot()
    finish(llm.engine)
    held = sum(bool(one.page_table) for state in snapshot.requests for one in state.sequences)
    small.restore(snapshot)
    small.check()
    assert 0 < small.stats().num_running < held
    assert same_tokens(before | finish(small)) == same_tokens(uninterrupted)


def test_only_live_pages_are_held(llm):
    llm.engine.add_request("one", [5] * 40, PARAMS[0])
    run_steps(llm.engine, 4)
    snapshot = llm.engine.snapshot()
    finish(llm.engine)
    assert snapshot.num_pages == 3 and len(snapshot.pages) == 2  # 40 tokens and a few, of 16 a page; two layers
    assert llm.engine.snapshot().num_pages == 0


def test_logprobs_are_kept_bit_for_bit(llm):
    """The same engine, hence the same programs over the rest: whatever was scored before is the same object's worth."""
    prompt, params = make_prompts(2)[1], PARAMS[1]
    expected = llm.generate(prompt, params, use_tqdm=False)[0]
    llm.engine.add_request("scored", prompt, params)
    run_steps(llm.engine, 12)
    snapshot = llm.engine.snapshot()
    known = len(snapshot.requests[0].sequences[0].output_token_ids)
    assert 0 < known < 33
    finish(llm.engine)
    llm.engine.restore(snapshot)
    output = finish(llm.engine)["scored"]
    assert essence(output)[0][0][:4] == essence(expected)[0][0][:4]
    assert output.outputs[0].logprobs[:known] == expected.outputs[0].logprobs[:known]
    assert output.prompt_logprobs == expected.prompt_logprobs
    ours, theirs = output.outputs[0].cumulative_logprob, expected.outputs[0].cumulative_logprob
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_requests_without_a_seed_draw_the_same_after_the_move(folder, llm):
    """The seeds of requests that come later go on counting from where the first engine was."""
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)

    def run(engine, after_first):
        engine.add_request("first", [5, 6, 7], params)
        run_steps(engine, 3)
        engine = after_first(engine)
        engine.add_request("second", [5, 6, 7], params)
        return same_tokens(finish(engine))

    def moved(engine):
        new = LLM(folder, **SMALL).engine
        new.restore(engine.snapshot())
        return new

    tokens = run(LLM(folder, **SMALL).engine, lambda engine: engine)
    assert tokens["first"] != tokens["second"]
    assert run(LLM(folder, **SMALL).engine, moved) == tokens


def test_a_request_that_ended_unseen_is_given_by_both(llm):
    """The snapshot reads what is in flight: what ends there is still to be delivered, here and where it is restored."""
    llm.engine.add_request("short", [5, 6, 7], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert [output.finished for output in run_steps(llm.engine, 2).values()] == []
    snapshot = llm.engine.snapshot()
    first = finish(llm.engine)["short"]
    assert len(first.outputs[0].token_ids) == 2
    llm.engine.restore(snapshot)
    assert essence(finish(llm.engine)["short"]) == essence(first)


def test_text_goes_on_in_the_middle_of_a_character():
    demo = LLM("demo", max_num_seqs=4, max_num_batched_tokens=64, use_tqdm=False)
    tokenizer, engine = demo.tokenizer, demo.engine
    smile = tokenizer.encode("\N{GRINNING FACE}")
    assert len(smile) > 2
    text_params = {"temperature": 0, "max_tokens": 2 * len(smile), "ignore_eos": True, "stop": ["never", "ends"]}
    allowed = SamplingParams(allowed_token_ids=smile, logit_bias={smile[0]: 5.0}, presence_penalty=2.0, **text_params)
    prompts = ["Once upon a time", "12 + 30 ="]
    expected = [output.outputs[0].text for output in demo.generate(prompts, allowed, use_tqdm=False)]
    for num_steps in range(2, 2 * len(smile)):
        for index, prompt in enumerate(prompts):
            engine.add_request(f"r{index}", tokenizer.encode(prompt), allowed, prompt)
        before = run_steps(engine, num_steps)
        snapshot = engine.snapshot()
        before |= finish(engine)
        engine.restore(snapshot)
        outputs = before | finish(engine)
        assert [outputs[f"r{index}"].outputs[0].text for index in range(2)] == expected


def test_streams_go_on_where_they_were(llm, uninterrupted):
    add_all(llm.engine)
    run_steps(llm.engine, 10)
    snapshot = llm.engine.snapshot()
    finish(llm.engine)
    llm.engine.restore(snapshot)
    lengths = {state.request_id: len(state.sequences[0].output_token_ids) for state in snapshot.requests}
    streamed = set()
    while llm.engine.has_unfinished_requests():
        for output in llm.engine.step():
            length = len(output.outputs[0].token_ids)
            assert lengths[output.request_id] <= length
            assert output.finished or int(output.request_id[1:]) % 2 == 0
            streamed |= {output.request_id} if not output.finished else set()
            lengths[output.request_id] = length
    assert streamed


CONTINUE = """
import json, sys
from miniinfer_jax import LLM
from miniinfer_jax.engine.snapshot import Snapshot
from tests.engine.cases import SMALL
llm = LLM(sys.argv[1], page_size=8, **SMALL)
outputs = llm.restore(Snapshot.load(sys.argv[2]), use_tqdm=False)
print(json.dumps({one.request_id: [c.token_ids for c in one.outputs] for one in outputs}))
"""


@pytest.fixture(scope="module")
def saved(folder, llm, tmp_path_factory):
    """A folder with a snapshot, and the outputs that ended before it."""
    place = tmp_path_factory.mktemp("snapshots") / "taken"
    add_all(llm.engine)
    before = run_steps(llm.engine, 25)
    llm.engine.snapshot().save(place)
    finish(llm.engine)
    return place, before


def test_taken_up_by_another_process(folder, saved, uninterrupted):
    place, before = saved
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CONTINUE, str(folder), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout.splitlines()[-1])
    expected = {name: [one.token_ids for one in output.outputs] for name, output in uninterrupted.items()}
    assert tokens == {name: ids for name, ids in expected.items() if name not in before}


def test_saved_and_loaded_it_is_the_same_value(llm, tmp_path):
    add_all(llm.engine)
    run_steps(llm.engine, 25)
    snapshot = llm.engine.snapshot()
    finish(llm.engine)
    snapshot.save(tmp_path / "one")
    loaded = Snapshot.load(tmp_path / "one")
    assert loaded.requests == snapshot.requests and loaded.model == snapshot.model
    assert snapshot.num_pages > 5
    for ours, theirs in zip(loaded.pages, snapshot.pages, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="exists already"):
        snapshot.save(tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]  # no draft is left


def files_of(place):
    return [path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size]


def test_any_file_missing_or_cut_short_is_named(saved, tmp_path, llm):

    place, _ = saved
    names = [path.relative_to(place) for path in files_of(place)]
    assert len(names) > 4
    for number, name in enumerate(names):
        for change in ("missing", "short"):
            copy = tmp_path / f"{number}-{change}"
            shutil.copytree(place, copy)
            if change == "missing":
                (copy / name).unlink()
            else:
                (copy / name).write_bytes((copy / name).read_bytes()[:-1])
            with pytest.raises(ValueError, match=str(name)):
                Snapshot.load(copy)


@pytest.mark.parametrize("key", ["requests", "model", "page_size", "num_requests"])
def test_any_entry_missing_is_named(saved, tmp_path, key):

    shutil.copytree(saved[0], tmp_path / "copy")
    path = tmp_path / "copy" / "snapshot.json"
    document = json.loads(path.read_text())
    del document[key]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"cut short: '{key}' is missing"):
        Snapshot.load(tmp_path / "copy")


def test_a_folder_without_a_snapshot(tmp_path):
    with pytest.raises(ValueError, match="holds no snapshot"):
        Snapshot.load(tmp_path)


def test_pages_missing_from_the_value(llm):

    llm.engine.add_request("one", [5] * 40, PARAMS[0])
    run_steps(llm.engine, 4)
    snapshot = llm.engine.snapshot()
    finish(llm.engine)
    with pytest.raises(ValueError, match=r"cut short: request 'one' needs 3 pages .* \[2\] are missing"):
        replace(snapshot, pages=tuple(layer[:2] for layer in snapshot.pages))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 5000.0}, r"rope.theta is 10000.0, here 5000.0"),
        ({"vocab_size": 101, "sliding_window": 50}, r"vocab_size is 97, here 101; sliding_windows is .*40.* here .*50"),
        ({"seed": 1}, "weights is '[0-9a-f]{16}', here '[0-9a-f]{16}'"),
    ],
)
def test_the_snapshot_of_another_model_is_refused(llm, tmp_path, changes, words):
    other = LLM(make_checkpoint(tmp_path / "other", **changes), **SMALL).engine
    add_all(llm.engine)
    run_steps(llm.engine, 5)
    snapshot = llm.engine.snapshot()
    finish(llm.engine)
    other.add_request("its own", [5, 6, 7], PARAMS[0])
    with pytest.raises(ValueError, match=f"another model: {words}"):
        other.restore(snapshot)
    assert list(finish(other)) == ["its own"]


def test_refusals_change_nothing(folder, llm):
    add_all(llm.engine)
    ended = run_steps(llm.engine, 20)
    snapshot = llm.engine.snapshot()
    with pytest.raises(ValueError, match="request id 'r0' is in use"):
        llm.engine.restore(snapshot)
    ended |= finish(llm.engine)
    assert set(ended) == {f"r{index}" for index in range(8)}
    short = LLM(folder, **SMALL | {"max_model_len": 100}).engine
    with pytest.raises(ValueError, match="raise max_model_len"):
        short.restore(snapshot)
    assert not short.has_requests()
    short.check()


def damaged(snapshot):
    """Values that no engine gives, and what is said of them."""
    [request] = snapshot.requests
    [sequence] = request.sequences
    yield lambda: replace(snapshot, pages=snapshot.pages[:1]), "the snapshot is damaged: it holds pages of the shapes"
    half = tuple(layer[:, :4] for layer in snapshot.pages)
    yield lambda: replace(snapshot, pages=half), "the snapshot is damaged: it holds pages of the shapes"
    for changes, words in (
        ({"output_token_ids": ()}, "computed of 20 tokens"),
        ({"num_computed": -1}, "has -1 computed of"),
        ({"output_token_ids": (10**6, *sequence.output_token_ids[1:])}, "holds the token id 1000000"),
    ):
        other = replace(request, sequences=(replace(sequence, **changes),))
        yield lambda other=other: replace(snapshot, requests=(other,)), words
    yield lambda: None, "None is no snapshot"


def test_damaged_values_are_refused_and_change_nothing(llm):
    engine = llm.engine
    engine.add_request(
        "r", make_prompts(1, seed=3, longest=20)[0][:1] * 20, SamplingParams(max_tokens=20, temperature=0)
    )
    for _ in range(8):
        engine.step()
    snapshot = engine.snapshot()
    engine.abort("r")
    for make, words in damaged(snapshot):
        with pytest.raises(ValueError, match=words):
            engine.restore(make())
        assert not engine.has_requests()
        engine.check()
    engine.restore(snapshot)
    assert finish(engine)["r"].finished
