"""The two benchmarks end to end on a model that takes milliseconds, and what they are made of."""

import json
import sys

import pytest

from miniinfer_jax import cli, models
from miniinfer_jax.benchmark import ceilings, roofline
from miniinfer_jax.benchmark.latency import steps_to_start, time_batch
from miniinfer_jax.benchmark.roofline import Ceilings
from miniinfer_jax.benchmark.shapes import SHAPES, write_shape
from miniinfer_jax.benchmark.throughput import Workload
from miniinfer_jax.cli.options import EngineOptions

ENGINE = "--model tiny --max-num-seqs 2 --max-num-batched-tokens 16 --max-model-len 128 --num-pages 16 --json"


@pytest.fixture(scope="module")
def open_once():
    """`EngineOptions.open_llm`, but one engine for all tests."""
    original, opened = EngineOptions.open_llm, []

    def open_llm(options: EngineOptions, **defaults):
        if not opened:
            opened.append(original(options, **defaults))
        return opened[0]

    return open_llm


@pytest.fixture
def bench(monkeypatch, capsys, open_once):
    monkeypatch.setattr(EngineOptions, "open_llm", open_once)

    def run(arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", f"miniinfer bench {arguments} {ENGINE}".split())
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return json.loads(captured.out)

    return run


def test_throughput(bench):
    figures = bench("throughput --num-requests 6 --min-input 5 --max-input 20 --min-output 5 --max-output 9")
    assert figures["num_requests"] == 6 and 30 <= figures["output_tokens"] <= 54
    assert figures["output_tokens_per_second"] == pytest.approx(figures["output_tokens"] / figures["seconds"])
    assert 0 < figures["roofline"]["share"] < 1
    assert figures["ceilings"]["bytes_per_second"] > 1e8


def test_latency(bench, monkeypatch):
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda dtype: Ceilings(1e10, 1e11))
    figures = bench("latency --batch-sizes 1,2 --input-len 30 --output-len 8")
    one, two = figures["latencies"]
    assert (one["batch_size"], two["batch_size"]) == (1, 2)
    assert 0 < one["seconds_to_first_token"] <= one["seconds_to_last_first_token"]
    assert 30 < one["mean_context"] < 50
    assert 0 < two["decode_roofline"]["share"] < 1
    assert two["decode_roofline"]["kv_bytes"] > 1.5 * one["decode_roofline"]["kv_bytes"]


def test_workload_is_drawn_from_its_seed():
    workload = Workload(num_requests=20)
    prompts, output_lens = workload.draw(vocab_size=500)
    assert (prompts, output_lens) == workload.draw(vocab_size=500)
    assert all(100 <= len(prompt) <= 1024 and max(prompt) < 500 for prompt in prompts)
    assert all(100 <= length <= 1024 for length in output_lens)


def test_published_shapes_have_their_published_sizes(tmp_path):
    sizes = {name: roofline.num_params(models.config_from_hf(shape)) / 1e9 for name, shape in SHAPES.items()}
    expected = {
        "qwen2.5-0.5b": 0.494,
        "qwen2.5-1.5b": 1.544,
        "qwen2.5-7b": 7.616,
        "qwen3-0.6b": 0.596,
        "qwen3-8b": 8.191,
    }
    assert {name: round(size, 3) for name, size in sizes.items() if name != "tiny"} == expected
    with pytest.raises(ValueError, match="qwen2.5-0.5b"):
        write_shape("gpt-5", tmp_path)


def test_steps_to_start_leave_room_for_those_that_decode():
    assert steps_to_start(batch_size=1, input_len=100, max_num_batched_tokens=2048) == 2
    assert steps_to_start(batch_size=64, input_len=1024, max_num_batched_tokens=2112) == 33


def test_a_sequence_that_ends_too_early_is_an_error():
    class Engine:
        def add_request(self, *_, **__): ...
        def step(self):
            return ["finished"]

        def stats(self):
            class Stats:
                num_prompt_tokens = 0

            return Stats

    with pytest.raises(ValueError, match="raise max_model_len or num_pages"):
        time_batch(Engine(), [[1, 2]], 4)
