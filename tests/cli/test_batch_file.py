"""Whole batch files: in any order, gone on with, refused."""

import json
from pathlib import Path

import pytest

from miniinfer_jax.batch_file import LineNumbers, open_results, run_batch_file

MESSAGES = [{"role": "user", "content": "hi"}]


def write_lines(path: Path, requests: list) -> Path:
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in requests))
    return path


def read_lines(path: Path) -> dict[int, dict]:
    results = [json.loads(line) for line in path.read_text().splitlines()]
    by_line = {result["line"]: result for result in results}
    assert len(by_line) == len(results), "a line was answered twice"
    return by_line


def run(llm, input: Path, output: Path, window: int = 3, **defaults):
    return run_batch_file(
        lambda: llm, input, output, {"max_tokens": 4, "ignore_eos": True, **defaults}, window=window, use_tqdm=False
    )


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_line_numbers_remember_what_came_out_of_order():
    numbers = LineNumbers()
    for number in (3, 1, 5, 2):
        numbers.add(number)
    assert [number in numbers for number in range(1, 7)] == [True, True, True, False, True, False]


def test_salts_of_lines(llm, paths):
    """The same prompt three times; the third finds the pages of the first, and a salt that is no text is refused."""
    input, output = paths
    requests = [{"prompt": "abc" * 20, "cache_salt": salt} for salt in ("a", "b", "a", 5)]
    llm.reset_prefix_cache()
    before = llm.engine.stats().num_prefix_hits
    summary = run(llm, write_lines(input, requests), output, window=1)
    assert llm.engine.stats().num_prefix_hits - before == 48  # the full pages of 60 tokens
    assert (summary.num_finished, summary.num_failed) == (3, 1)
    assert "cache_salt is 5" in read_lines(output)[4]["error"]["message"]


def test_good_and_bad_lines_of_every_form(llm, paths):
    requests = [
        {"prompt": "abc", "max_tokens": 8, "custom_id": "first"},
        "{broken",
        "",
        {"prompt_token_ids": [5, 6, 7]},
        {"prompt_token_ids": [5] * 500},
        {"prompt_token_ids": [10_000]},
        {"messages": MESSAGES},
        {"prompt": "abc", "no_such": 1},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "abc"}},
        {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES}},
        {"custom_id": "e", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x" * 500}},
        {"prompt": "abc", "n": 2, "temperature": 1, "logprobs": 1, "prompt_logprobs": 0},
    ]
    input, output = paths
    summary = run(llm, write_lines(input, requests), output)
    results = read_lines(output)
    assert set(results) == set(range(1, 13)) - {3}  # a blank line is no request
    bad = {number for number, result in results.items() if "response" not in result and result["error"]}
    assert bad == {2, 5, 6, 8}
    assert (summary.num_finished, summary.num_failed, summary.num_already_done) == (6, 5, 0)
    assert results[1]["custom_id"] == "first" and len(results[1]["outputs"][0]["token_ids"]) == 8
    assert [results[line]["response"]["status_code"] for line in (9, 10, 11)] == [200, 200, 400]
    assert len(results[12]["outputs"]) == 2 and len(results[12]["prompt_logprobs"]) == 3
    assert not llm.engine.has_requests()


def test_a_finished_run_needs_no_model(llm, paths):
    input, output = paths
    run(llm, write_lines(input, [{"prompt": "abc"}]), output)
    before = output.read_bytes()

    def no_model():
        raise AssertionError("nothing is left to do")

    summary = run_batch_file(no_model, input, output, {}, window=1, use_tqdm=False)
    assert summary.num_already_done == 1 and output.read_bytes() == before


def test_it_goes_on_behind_a_torn_line_with_the_same_draws(llm, paths):
    input, output = paths
    write_lines(input, [{"prompt": f"line {number}", "temperature": 1} for number in range(8)])
    run(llm, input, output)
    whole = read_lines(output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:-20])
    summary = run(llm, input, output, window=1)
    assert (summary.num_already_done, summary.num_finished) == (3, 5)
    again = read_lines(output)
    assert {n: r["outputs"] for n, r in again.items()} == {n: r["outputs"] for n, r in whole.items()}


def test_an_interrupt_leaves_whole_lines_and_an_idle_engine(llm, paths, monkeypatch):
    input, output = paths
    write_lines(input, [{"prompt": "abc", "max_tokens": number} for number in range(1, 9)])
    step, steps = llm.engine.step, iter(range(10))

    def interrupted():
        if next(steps) == 4:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(llm, input, output)
    assert 0 < len(read_lines(output)) < 8
    assert not llm.engine.has_requests()
    run(llm, input, output)
    assert set(read_lines(output)) == set(range(1, 9))


def test_an_output_of_another_input_is_refused(llm, paths):
    input, output = paths
    run(llm, write_lines(input, [{"prompt": "abc"}, {"prompt": "def"}]), output)
    with pytest.raises(ValueError, match="another input: line 2"):
        run(llm, write_lines(input, [{"prompt": "abc"}, {"prompt": "xyz"}]), output)
    with pytest.raises(ValueError, match="has no line 2"):
        run(llm, write_lines(input, [{"prompt": "abc"}]), output)


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"line": 1}\n', b"[]\n"])
def test_a_file_that_holds_no_results_is_left_alone(llm, paths, content):
    input, output = paths
    write_lines(input, [{"prompt": "abc"}])
    output.write_bytes(content)
    with pytest.raises(ValueError, match="something else than results"):
        run(llm, input, output)
    assert output.read_bytes() == content


def test_bad_files_are_refused_before_a_model_is_loaded(paths):
    input, output = paths
    with pytest.raises(ValueError, match="does not exist"):
        run(None, input, output)
    assert not output.exists()
    write_lines(input, [{"prompt": "abc"}])
    with pytest.raises(ValueError, match="same file"):
        run(None, input, input)
    with pytest.raises(ValueError, match="temperature"):
        run(None, input, output, temperature=-1)
    with open_results(output, input), pytest.raises(ValueError, match="another run"):
        run(None, input, output)
