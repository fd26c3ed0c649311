"""The command `miniinfer`, mostly inside this process: what is printed, what is refused."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from miniinfer_jax import cli
from miniinfer_jax.cli.bench import parse_sizes
from miniinfer_jax.cli.options import EngineOptions, SamplingOptions, parse_logit_bias
from miniinfer_jax.sampling_params import SamplingParams


class Stdin:
    """Something piped in; or, with no text, a terminal where nobody types."""

    def __init__(self, text: str | None):
        self._text = text

    def isatty(self) -> bool:
        return self._text is None

    def read(self) -> str:
        return self._text or ""


@pytest.fixture
def miniinfer(monkeypatch, capsys, llm):
    """Runs a command line with the shared engine; returns (exit code, stdout, stderr)."""

    def run(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["miniinfer", *arguments])
        monkeypatch.setattr(sys, "stdin", Stdin(stdin))
        monkeypatch.setattr(EngineOptions, "open_llm", lambda self, **defaults: llm)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_help_is_quick_and_loads_no_jax():
    code = (
        "import sys; sys.argv = ['miniinfer', '--help']\n"
        "import miniinfer_jax.cli\n"
        "try: miniinfer_jax.cli.main()\n"
        "finally: print([name for name in ('jax', 'numpy', 'transformers', 'rich') if name in sys.modules])"
    )
    used = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "generate" in finished.stdout and finished.stdout.endswith("[]\n")
    assert min(used) < 0.5  # processor seconds, which other processes do not stretch as they do the clock's


def test_generate_streams_one_prompt(miniinfer, llm):
    code, out, _ = miniinfer("generate", "abc", "--max-tokens", "5", "--ignore-eos")
    expected = llm.generate("abc", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert (code, out) == (0, expected[0].outputs[0].text + "\n")
    assert miniinfer("generate", "--max-tokens", "5", "--ignore-eos", stdin="abc") == (0, out, "")


def test_generate_as_json(miniinfer):
    flags = "--json --max-tokens 3 --ignore-eos -n 2 --temperature 1 --logprobs 1 --logit-bias 7=100"
    code, out, _ = miniinfer("generate", "abc", *flags.split())
    document = json.loads(out)
    assert code == 0 and document["usage"]["completion_tokens"] == 6
    assert [completion["token_ids"] for completion in document["outputs"]] == [[7, 7, 7]] * 2
    assert document["outputs"][0]["logprobs"][0]["7"]["logprob"] < 0


def test_generate_prints_several_continuations(miniinfer):
    _, out, _ = miniinfer("generate", "abc", "-n", "2", "--temperature", "1", "--max-tokens", "3")
    assert out.startswith("[0] ") and "\n[1] " in out


def test_generate_answers_a_file(miniinfer, tmp_path: Path):
    input, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    input.write_text('{"prompt": "abc"}\n')
    code, out, _ = miniinfer("generate", "--input", str(input), "--output", str(output), "--max-tokens", "3", "--json")
    assert code == 0 and json.loads(out)["num_finished"] == 1
    assert len(json.loads(output.read_text())["outputs"]) == 1


def test_chat_answers_what_is_piped_in(miniinfer, llm):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    expected = llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text
    flags = ("--system", "s", "--max-tokens", "4", "--ignore-eos")
    assert miniinfer("chat", *flags, stdin="hello\n") == (0, expected + "\n", "")
    _, out, _ = miniinfer("chat", *flags, "--json", stdin="hello\n")
    assert json.loads(out)["content"] == expected


def test_chat_remembers_and_forgets(miniinfer, monkeypatch):
    typed = iter(["ab", "ab", "", "/reset", "ab", "x" * 500, "ab", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    code, out, err = miniinfer("chat", "--json", "--max-tokens", "2", "--ignore-eos")
    lengths = [json.loads(line)["prompt_tokens"] for line in out.splitlines()]
    assert code == 0
    assert lengths[2] == lengths[0] < lengths[1]  # /reset forgets
    assert lengths[3] == lengths[1]  # the message that was too long is forgotten alone
    assert "/reset starts anew" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate",), "the prompt is empty"),
        (("generate", "a", "--temperature", "-1"), "temperature is -1"),
        (("generate", "a", "--logit-bias", "x"), "TOKEN_ID=BIAS"),
        (("generate", "--input", "a"), "--output"),
        (("generate", "a", "--input", "a", "--output", "b"), "use one of them"),
        (("generate", "--input", "absent", "--output", "b"), "absent"),
        (("generate", "x" * 500), "max_model_len"),
        (("chat", "-n", "2", "--temperature", "1"), "n is 2"),
        (("bench", "latency", "--batch-sizes", "1,a"), "1,a"),
        (("bench", "latency", "--input-len", "0"), "input_len is 0"),
        (("bench", "throughput", "--min-input", "9", "--max-input", "8"), "min_input is 9"),
        (("bench", "throughput", "--plot", "roofline.pdf"), "must end in .png"),
        (("bench", "latency", "--plot", "/absent/roofline.png"), "create it first"),
        (("info", "--model", "/absent"), "/absent"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(miniinfer, arguments, message):
    code, out, err = miniinfer(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err
    assert err.count("\n") == 1


def test_empty_pipe_is_refused(miniinfer):
    assert miniinfer("chat", stdin=" \n")[0] == 2
    assert miniinfer("generate", stdin="")[0] == 2


def test_a_traceback_on_demand(miniinfer, monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    monkeypatch.setattr(sys, "argv", ["miniinfer", "generate", "a", "--temperature", "-1"])
    with pytest.raises(ValueError, match="temperature"):
        cli.main()


def test_info_tells_sizes_without_loading_weights(miniinfer, tiny_model: Path):
    flags = f"info --model {tiny_model} --max-num-seqs 4 --max-num-batched-tokens 64 --max-model-len 64".split()
    code, out, _ = miniinfer(*flags, "--json")
    document = json.loads(out)
    model = document["model"]
    assert code == 0 and document["devices"][0]["platform"] == "cpu"
    assert model["num_params"] == 107_072 and model["weight_bytes"] == 4 * 107_072
    # 2 layers, 16 tokens a page, 2 kv heads of 16, key and value, float32
    assert model["page_bytes"] == 2 * 16 * 2 * 16 * 2 * 4
    assert model["cache_bytes"] == model["page_bytes"] * model["num_pages"]
    assert (model["ragged_bucket_tokens"][-1], model["decode_bucket_rows"][-1]) == (64, 4)
    _, out, _ = miniinfer(*flags)
    assert "  num_params: 107072\n" in out and "    rope:\n" in out


def test_every_sampling_parameter_has_a_flag():
    """But for the seed, which the engine has, and detokenize, without which nothing could be shown."""
    options = SamplingOptions(
        stop=["a"], stop_token_id=[1], bad_word=["b"], allowed_token_id=[2], logit_bias=["3=1"], logprobs=1
    )
    options.prompt_logprobs = 1
    values = options.as_values()
    assert set(SamplingParams.__dataclass_fields__) - set(values) == {"seed", "detokenize"}
    assert SamplingParams.from_dict(values).stop == ("a",)


def test_small_parsers():
    assert parse_logit_bias(["3=-1.5", "4=2"]) == {3: -1.5, 4: 2.0}
    assert parse_sizes("1, 8,32") == [1, 8, 32]
