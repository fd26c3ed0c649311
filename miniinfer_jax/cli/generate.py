"""`miniinfer generate`: one prompt to the screen as it comes, or a file of requests to a file of results."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from miniinfer_jax.cli.options import EngineOptions, SamplingOptions, flatten_options
from miniinfer_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from miniinfer_jax.llm import LLM, Prompt

BATCH_MAX_NUM_SEQS = 256


@flatten_options
def generate(
    sampling: SamplingOptions,
    engine: EngineOptions,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; left out: read from stdin.")] = None,
    input: Annotated[Path | None, typer.Option(help="A JSONL file, one request a line.")] = None,
    output: Annotated[Path | None, typer.Option(help="Its results; a run that was killed goes on here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Continue one prompt, or answer every line of a file."""
    if (input is None) != (output is None):
        raise ValueError("--input and --output belong together; give both, or neither and a prompt")
    if input is not None and output is not None:
        if prompt is not None:
            raise ValueError("a prompt and --input were both given; use one of them")
        generate_file(input, output, sampling, engine, as_json)
    else:
        generate_one(_given_prompt(prompt), sampling, engine, as_json)


def _given_prompt(prompt: str | None) -> str:
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if not prompt:
        raise ValueError('the prompt is empty; write it after the command: miniinfer generate "Once upon a time"')
    return prompt


def generate_one(prompt: str, sampling: SamplingOptions, engine: EngineOptions, as_json: bool) -> None:
    params = SamplingParams.from_dict(sampling.as_values())
    llm = open_small(engine, params)
    if as_json:
        print(json.dumps(_document(llm, prompt, params), ensure_ascii=False))
    elif params.n == 1:
        print_stream(llm, prompt, params)
    else:
        for completion in llm.generate([prompt], params, use_tqdm=False)[0].outputs:
            print(f"[{completion.index}] {completion.text}")


def open_small(engine: EngineOptions, params: SamplingParams) -> "LLM":
    """The LLM for one request at a time: few sequences and tokens a step, so that few shapes are compiled."""
    return engine.open_llm(max_num_seqs=params.n, max_num_batched_tokens=max(256, params.n))


def _document(llm: "LLM", prompt: str, params: SamplingParams) -> dict[str, Any]:
    from miniinfer_jax.batch_lines import BatchRequest, result_line

    output = llm.generate([prompt], params, use_tqdm=False)[0]
    request = BatchRequest(params=params, prompt=prompt)
    return {"prompt": prompt, **result_line(request, output, output.request_id, llm.model_config.architecture)}


def print_stream(llm: "LLM", prompt: "Prompt", params: SamplingParams) -> str:
    """Prints the continuation as it comes, and returns it whole."""
    pieces = []
    for delta in llm.stream([prompt], params):
        print(delta.text, end="", flush=True)
        pieces.append(delta.text)
        if delta.finish_reason == "error":
            print()
            raise ValueError("the model's logits were not finite; a damaged checkpoint, or a dtype too narrow for it")
    print()
    return "".join(pieces)


def generate_file(input: Path, output: Path, sampling: SamplingOptions, engine: EngineOptions, as_json: bool) -> None:
    from miniinfer_jax.batch_file import run_batch_file

    max_num_seqs = engine.max_num_seqs or BATCH_MAX_NUM_SEQS
    summary = run_batch_file(
        lambda: engine.open_llm(max_num_seqs=max_num_seqs),
        input,
        output,
        sampling.as_values(),
        window=2 * max_num_seqs,  # whenever a sequence ends, the next one is already tokenized and waiting
        seed=engine.seed,
        use_tqdm=sys.stderr.isatty(),
    )
    if as_json:
        print(json.dumps(asdict(summary)))
    else:
        rate = summary.num_output_tokens / max(summary.seconds, 1e-9)
        print(
            f"{summary.num_finished} answered, {summary.num_failed} failed, {summary.num_already_done} done before; "
            f"{summary.num_output_tokens} tokens in {summary.seconds:.1f} s ({rate:,.0f} tokens/s)"
        )
