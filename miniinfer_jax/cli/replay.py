"""`miniinfer replay`: runs a recorded engine again, and stops with it open for inspection."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def replay(
    file: Annotated[Path, typer.Argument(help="What LLM(record=...) wrote.")],
    until_step: Annotated[int | None, typer.Option(help="Stop behind this step; default: at the end.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a recorded engine again, each decision and token checked; a terminal then shows `engine` in Python."""
    from miniinfer_jax.replay import replay as run_again

    engine = run_again(file, until_step, use_tqdm=sys.stderr.isatty())
    stats, requests = asdict(engine.stats()), [asdict(output) for output in engine.outputs()]
    if as_json:
        print(json.dumps({"stats": stats, "requests": requests}))
        return
    print(f"repeated {stats['num_steps']} steps with {stats['num_generated_tokens']} tokens, all as recorded")
    for output in engine.outputs():
        drawn = ", ".join(f"{len(one.token_ids)} tokens {one.text!r:.60}" for one in output.outputs)
        print(f"{output.request_id}: {len(output.prompt_token_ids)} prompt tokens; {drawn}")
    if sys.stdin.isatty():
        import code

        code.interact(
            "`engine` is the LLMEngine as it was; engine.step() goes on. Ctrl-D ends.", local={"engine": engine}
        )
