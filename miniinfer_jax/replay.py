"""`replay`: runs a recorded engine again, record by record, and leaves it open."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from miniinfer_jax.engine.llm_engine import LLMEngine
from miniinfer_jax.engine.replay import ReplayError, drive, read_log
from miniinfer_jax.engine.snapshot import check_model
from miniinfer_jax.llm import LLM


def replay(
    path: str | PathLike[str],
    until_step: int | None = None,
    *,
    logits_processors: Sequence[Any] = (),
    use_tqdm: bool = False,
) -> LLMEngine:
    """The engine of a log as it was after step until_step (None: at the log's end), every record on the way repeated.

    Outputs of the steps replayed are not given again; whatever is called next goes on from there, and is not compared.
    Raises ReplayError, which is a ValueError, for a damaged log (naming the record), one of another model, one that was
    recorded with other logits processors, and for the first record that comes out otherwise.
    """
    if until_step is not None and until_step < 0:
        raise ReplayError(f"until_step is {until_step}; steps are counted from 1, and 0 is before the first")
    header, records = read_log(path)
    names = [getattr(one, "__qualname__", repr(one)) for one in logits_processors]
    if names != header["logits_processors"]:
        recorded = ", ".join(header["logits_processors"]) or "none"
        raise ReplayError(f"{path} was recorded with logits processors {recorded}: give replay() the same ones")
    engine = LLM(**header["arguments"], logits_processors=logits_processors, use_tqdm=use_tqdm).engine
    check_model(header["description"], engine.describe_model(), what=str(path))
    drive(engine, records, until_step)
    return engine
