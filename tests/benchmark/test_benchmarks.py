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

ENGINE = "--model tiny --max-num-seqs 2 --max-num-batched-tokens 16 --max-model-len 128 --num-pages 16"


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
def printed(monkeypatch, capsys, open_once):
    """Runs `miniinfer bench` with these arguments; returns what it prints."""
    monkeypatch.setattr(EngineOptions, "open_llm", open_once)

    def run(arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", f"miniinfer bench {arguments} {ENGINE}".split())
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return captured.out

    return run


@pytest.fixture
def bench(printed):
    return lambda arguments: json.loads(printed(f"{arguments} --json"))


def test_throughput(bench):
    figures = bench("throughput --num-requests 6 --min-input 5 --max-input 20 --min-output 5 --max-output 9")
    assert figures["num_requests"] == 6 and 30 <= figures["output_tokens"] <= 54
    assert figures["output_tokens_per_second"] == pytest.approx(figures["output_tokens"] / figures["seconds"])
    assert 0 < figures["roofline"]["share"] < 1
    assert figures["ceilings"]["bytes_per_second"] > 1e8
    roofline = figures["roofline"]
    assert roofline["num_bytes"] == roofline["prefill"]["num_bytes"] + roofline["decode"]["num_bytes"]
    assert roofline["read_share"] == pytest.approx(
        roofline["num_bytes"] / figures["seconds"] / figures["ceilings"]["bytes_per_second"]
    )


def test_latency(bench, monkeypatch):
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda dtype: Ceilings(1e10, 1e11))
    figures = bench("latency --batch-sizes 1,2 --input-len 30 --output-len 8")
    one, two = figures["latencies"]
    assert (one["batch_size"], two["batch_size"]) == (1, 2)
    assert 0 < one["seconds_to_first_token"] <= one["seconds_to_last_first_token"]
    assert 30 < one["mean_context"] < 50
    assert 0 < two["decode_roofline"]["share"] < 1
    assert two["decode_roofline"]["kv_bytes"] > 1.5 * one["decode_roofline"]["kv_bytes"]
    shares = [one["decode_roofline"][name] for name in ("share", "read_share", "matmul_share")]
    assert shares[0] == pytest.approx(max(shares[1:]))
    memory = figures["memory"]
    assert memory["weight_bytes"] == 4 * figures["num_params"]
    assert memory["page_bytes"] == 2 * 16 * 16 * 2 * 2 * 16 * 4  # layers, pages, tokens, kv heads, k and v, size, f32
    assert memory["peak_bytes"] is memory["workspace_bytes"] is None  # a CPU does not say
    assert "profile" not in one


LATENCY = "latency --batch-sizes 2 --input-len 30 --output-len 6"
THROUGHPUT = "throughput --num-requests 6 --min-input 5 --max-input 20 --min-output 5 --max-output 9"


def test_a_profile_of_decoding(bench):
    (row,) = bench(f"{LATENCY} --profile")["latencies"]
    profile = row["profile"]
    assert profile["num_steps"] == 6
    assert 0 < profile["busy_seconds_per_step"] <= profile["device_seconds_per_step"]
    assert 0 <= profile["idle_share"] < 1 and 0 <= profile["idle_share_within_steps"] < 1
    assert profile["wall_seconds_per_step"] == row["seconds_per_token"]
    kernels = profile["kernels"]
    times = [kernel["seconds_per_step"] for kernel in kernels]
    assert times == sorted(times, reverse=True)
    known = [kernel for kernel in kernels if kernel["ceiling_share"]]
    # Every product with a weight is known: at least their bytes, and the head's table is one of them.
    assert sum(kernel["operations"] for kernel in known) >= 2 * 2 * 512 * 64
    assert any(kernel["stage"] == "sample/logits" for kernel in kernels)


def test_a_profile_of_a_whole_run(bench):
    figures = bench(f"{THROUGHPUT} --profile")
    assert figures["profile"]["num_steps"] == max(1, figures["num_steps"] // 4)
    assert figures["profile"]["busy_share_of_wall"] > 0


def test_what_is_printed(printed, tmp_path):
    plot = tmp_path / "latency.png"
    out = printed(f"{LATENCY} --profile --plot {plot}")
    for words in ("measured ceilings:", "least ms", "of read", "batch 2, a token", "peak unknown; weights 0.4 MB"):
        assert words in out
    assert "idle between steps" in out and "sample/logits" in out and " others " in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_a_whole_run_prints(printed, tmp_path):
    plot = tmp_path / "throughput.png"
    out = printed(f"{THROUGHPUT} --plot {plot}")
    assert "output tokens/s; roofline" in out and "whole run" in out and "profile:" not in out
    assert plot.exists()


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
