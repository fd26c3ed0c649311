"""A recorded run, replayed: every decision and token again, or an error that names the record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.replay import replay
from tests.engine.cases import SMALL, make_prompts
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[1]
# A pool so small that sequences are preempted.
SIZES = SMALL | {"deterministic": True, "num_pages": 14, "seed": 11}
PARAMS = [
    SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=50, ignore_eos=True, logit_bias={7: np.float32(2.0)}),  # without a seed of its own
    SamplingParams(n=2, max_tokens=40, presence_penalty=1.0, min_tokens=5, prompt_logprobs=1),
    SamplingParams(temperature=0.5, max_tokens=30, stop_token_ids=[9, 10, 11]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def run(engine):
    """Everything that can be called, while steps go on; the last output of each request."""
    last = {}
    prompts = make_prompts(12, longest=120)
    for step in range(1000):
        if step % 2 == 0 and step // 2 < len(prompts):
            number = step // 2
            engine.add_request(f"r{number}", prompts[number], PARAMS[number % 4], streams=number % 3 == 0)
        if step == 5:
            with pytest.raises(ValueError, match="empty"):
                engine.add_request("refused", [], PARAMS[0])
            engine.abort("r1")
        if step == 9:
            engine.rewind("r0", 4, seed=5)
            with pytest.raises(ValueError, match="past its prompt"):
                engine.rewind("r0", 1000)
        if step == 14:
            engine.snapshot()
        if step in (20, 25):
            engine.sleep(keep_cache=step == 20)
            engine.wake_up()
        last |= {output.request_id: output for output in engine.step()}
        if step > 30 and not engine.has_unfinished_requests():
            return last
    raise AssertionError("the run does not end")


@pytest.fixture(scope="module")
def recorded(folder, tmp_path_factory):
    """(log, outputs): of a run with preemptions."""
    path = tmp_path_factory.mktemp("logs") / "log.jsonl"
    engine = LLM(folder, record=path, **SIZES).engine
    outputs = run(engine)
    assert engine.stats().num_preemptions > 2
    return path, outputs


def essence(output):
    return [(one.token_ids, one.logprobs, one.cumulative_logprob, one.finish_reason) for one in output.outputs]


def test_the_whole_run_again(recorded):
    engine = replay(recorded[0])
    assert not engine.has_unfinished_requests() and engine.stats().num_preemptions > 2
    engine.check()


@pytest.mark.parametrize("step", [12, 40, 90])
def test_stopping_at_a_step_and_going_on_gives_the_same_bits(recorded, step):
    """What arrives later is missing then, and what is there ends in the same tokens and log-probabilities."""
    path, outputs = recorded
    engine = replay(path, until_step=step)
    assert engine.stats().num_steps == step
    got = {}
    while engine.has_unfinished_requests():
        got |= {output.request_id: output for output in engine.step() if output.finished}
    assert len(got) > 1
    assert {name: essence(output) for name, output in got.items()} == {name: essence(outputs[name]) for name in got}


def test_an_engine_left_in_the_middle_can_be_looked_at(recorded):
    engine = replay(recorded[0], until_step=12)
    outputs = {output.request_id: output for output in engine.outputs()}
    assert "r0" in outputs and "r1" not in outputs and outputs["r0"].outputs[0].token_ids
    assert replay(recorded[0], until_step=0).stats().num_steps == 0
    with pytest.raises(ValueError, match="until_step is -1"):
        replay(recorded[0], until_step=-1)


def changed(log, tmp_path, change):
    """A copy of the log, its lines changed by a function."""
    path = tmp_path / "changed.jsonl"
    path.write_text("".join(line + "\n" for line in change(log.read_text().splitlines())))
    return path


@pytest.mark.parametrize("number", [0, 1, 7, 30])
def test_a_missing_record_is_named(recorded, tmp_path, number):
    path = changed(recorded[0], tmp_path, lambda lines: lines[:number] + lines[number + 1 :])
    with pytest.raises(ValueError, match=rf"record {number} is missing"):
        replay(path)


def test_a_record_cut_short_is_named(recorded, tmp_path):
    path = changed(recorded[0], tmp_path, lambda lines: [*lines[:20], lines[20][: len(lines[20]) // 2]])
    with pytest.raises(ValueError, match="record 20 is cut short"):
        replay(path)
    with pytest.raises(ValueError, match="record 0 is missing"):
        replay(changed(recorded[0], tmp_path, lambda lines: []))
    with pytest.raises(ValueError, match="cannot be read"):
        replay(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("tokens", {"tokens": [["r0", 0, 5]]}, "tokens was .*now"),
        ("step", {"chunks": []}, "chunks was .*now"),
        ("step", {"new_pages": [[0, 0, 17]]}, "new_pages was"),
        ("add", {"seeds": [1]}, "seeds was"),
        ("rewind", {"num_tokens": 2}, "not repeated"),
        ("abort", {"request_id": "r5"}, "not repeated"),
    ],
)
def test_a_run_that_goes_another_way_says_where(recorded, tmp_path, kind, values, words):
    lines = recorded[0].read_text().splitlines()
    number = next(place for place, line in enumerate(lines) if json.loads(line)["kind"] == kind)
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    path = changed(recorded[0], tmp_path, lambda _: lines)
    with pytest.raises(ValueError, match=rf"record \d+ .*{words}"):
        replay(path)


def test_a_record_without_its_values_is_named(recorded, tmp_path):
    lines = recorded[0].read_text().splitlines()
    record = json.loads(lines[1])
    del record["params"]
    lines[1] = json.dumps(record)
    with pytest.raises(ValueError, match=r"record 1 \(add\) has no 'params'"):
        replay(changed(recorded[0], tmp_path, lambda _: lines))


def test_another_model_is_refused(recorded, tmp_path):
    other = make_checkpoint(tmp_path / "other", seed=1)

    def change(lines):
        header = json.loads(lines[0])
        header["arguments"]["model"] = str(other)
        return [json.dumps(header), *lines[1:]]

    with pytest.raises(ValueError, match="of another model: weights is"):
        replay(changed(recorded[0], tmp_path, change))


def test_logits_processors_are_asked_for(folder, tmp_path):
    def halve(logits, inputs):
        return logits / 2

    llm = LLM(folder, record=tmp_path / "log.jsonl", logits_processors=[halve], **SIZES)
    llm.generate(make_prompts(3), SamplingParams(max_tokens=9), use_tqdm=False)
    with pytest.raises(ValueError, match="recorded with logits processors .*halve: give replay"):
        replay(tmp_path / "log.jsonl")
    assert replay(tmp_path / "log.jsonl", logits_processors=[halve]).stats().num_generated_tokens > 3


def test_recording_is_refused_over_a_file_and_refuses_snapshots(folder, recorded, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        LLM(folder, record=recorded[0], **SIZES)
    engine = LLM(folder, record=tmp_path / "log.jsonl", **SIZES).engine
    snapshot = engine.snapshot()
    with pytest.raises(ValueError, match="records takes up no snapshot"):
        engine.restore(snapshot)


def test_the_command_in_another_process(recorded):
    path, _ = recorded
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def command(*arguments):
        line = [sys.executable, "-m", "miniinfer_jax.cli", "replay", *map(str, arguments)]
        return subprocess.run(
            line, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )

    whole = command(path)
    assert whole.returncode == 0, whole.stderr
    assert "all as recorded" in whole.stdout
    document = json.loads(command(path, "--until-step", 12, "--json").stdout)
    assert document["stats"]["num_steps"] == 12 and document["requests"][0]["request_id"] == "r0"
    nowhere = command(path.with_name("nowhere.jsonl"))
    assert nowhere.returncode == 2 and "error: " in nowhere.stderr
