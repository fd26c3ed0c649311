"""Answer every line of a JSONL file: python scripts/generate_batch.py in.jsonl out.jsonl [--model demo ...].

One request a line, {"prompt": ...}, {"prompt_token_ids": ...} or {"messages": ...} beside its sampling parameters,
or an OpenAI batch line. Run it again after a kill and it goes on where it was.
"""

from pathlib import Path
from typing import Annotated

import typer

from miniinfer_jax.cli import run
from miniinfer_jax.cli.generate import generate_file
from miniinfer_jax.cli.options import EngineOptions, SamplingOptions, flatten_options

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
@flatten_options
def generate_batch(
    input: Annotated[Path, typer.Argument(help="A JSONL file, one request a line.")],
    output: Annotated[Path, typer.Argument(help="Its results; a run that was killed goes on here.")],
    sampling: SamplingOptions,
    engine: EngineOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Answer every line of a file of requests; the sampling flags hold for lines that say nothing else."""
    generate_file(input, output, sampling, engine, as_json)


if __name__ == "__main__":
    run(app)
