"""The command `miniinfer`. Nothing here imports JAX before a command needs it, so that --help is quick."""

import os
import sys

import typer

from miniinfer_jax.cli import bench, chat, generate, info, replay

TRACEBACK_VARIABLE = "MINIINFER_TRACEBACK"

app = typer.Typer(
    name="miniinfer",
    help=f"MiniInfer: LLM inference in JAX. Set {TRACEBACK_VARIABLE}=1 to see where an error comes from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: importing rich costs more than everything else of --help
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("info")(info.info)
app.command("replay")(replay.replay)
app.add_typer(bench.app, name="bench")


def run(application: typer.Typer) -> None:
    """Runs a command line: a user's error is one line on stderr and exit code 2."""
    try:
        application()
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """What the console script `miniinfer` calls."""
    run(app)
