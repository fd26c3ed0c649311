"""The log of an engine: every arrival, decision and token as a line of JSON, and whether a second run repeats it.

An engine gives each record to a function: `Recorder.take` writes it down, `Replayer.take` compares it with the line
that was written. Records are numbered. The first, "engine", says how the engine was made; "tokens" is what was read;
all others are calls ("add", "fork", "abort", "step", ...) with their arguments, "step" with what was decided in it.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniinfer_jax.engine.request import Continuation, Request
from miniinfer_jax.engine.validation import RequestError
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence, StepPlan

if TYPE_CHECKING:
    from miniinfer_jax.engine.llm_engine import LLMEngine

FORMAT = 1
Record = dict[str, Any]
TakeRecord = Callable[[Record], None]
Owners = dict[Sequence, tuple[Request, Continuation]]


class ReplayError(ValueError):
    """A log that is damaged, or that this engine does not repeat; says which record, and what differs."""


class Recorder:
    """Writes records to a new file, each at once, so that the log of a process that dies ends where it died."""

    def __init__(self, path: str | PathLike[str], header: Record) -> None:
        check_new(path)
        self._file = Path(path).open("x", encoding="utf-8", buffering=1)  # noqa: SIM115, open as long as the engine
        self._number = 0
        self.take({"kind": "engine", "format": FORMAT, **header})

    def take(self, record: Record) -> None:
        self._file.write(_dump({"number": self._number, **record}) + "\n")
        self._number += 1


def check_new(path: str | PathLike[str]) -> None:
    """Raises ReplayError where there is a file already."""
    if Path(path).exists():
        raise ReplayError(f"{path} exists already; record into a file that does not")


class Replayer:
    """The records of a log, in order; each that an engine makes while it is driven by them must be the next one."""

    def __init__(self, records: list[Record]) -> None:
        self._records = records
        self.num_done = 0

    @property
    def next(self) -> Record | None:
        """The record that comes now; None behind the last."""
        return self._records[self.num_done] if self.num_done < len(self._records) else None

    def take(self, record: Record) -> None:
        expected, got = self.next, json.loads(_dump(record))
        if expected is None:
            raise ReplayError(f"the log ends with record {self.num_done}, and the engine goes on with {got!r:.200}")
        self.num_done += 1
        names = [name for name in {**expected, **got} if name != "number" and expected.get(name) != got.get(name)]
        if names:
            values = "; ".join(f"{name} was {expected.get(name)!r:.300}, now {got.get(name)!r:.300}" for name in names)
            raise ReplayError(
                f"record {expected['number']} ({expected['kind']}) is not repeated: {values}. A run repeats itself "
                "on the same kind of device and version of jax; record with deterministic=True to be sure"
            )


def read_log(path: str | PathLike[str]) -> tuple[Record, list[Record]]:
    """The header of a log and its records. Raises ReplayError, naming the record, if one is missing or cut short."""
    records: list[Record] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ReplayError(f"{path} cannot be read: {error.strerror}") from None
    for line in lines:
        expected = len(records)
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "number" not in record or "kind" not in record:
            raise ReplayError(f"{path}: record {expected} is cut short or damaged: {line!r:.80}; remove what follows")
        if record["number"] != expected:
            raise ReplayError(f"{path}: record {expected} is missing; record {record['number']} stands in its place")
        records.append(record)
    if not records or records[0]["kind"] != "engine":
        raise ReplayError(f"{path}: record 0 is missing, which says how the engine was made")
    if records[0].get("format") != FORMAT:
        raise ReplayError(f"{path} is a log of format {records[0].get('format')!r}, this version reads {FORMAT}")
    return records[0], records[1:]


def add_record(request: Request) -> Record:
    """An arrival; `seeds` are those that its sequences draw with."""
    first = request.continuations[0].sequence
    return {
        "kind": "add",
        "request_id": request.request_id,
        "prompt": request.prompt,
        "prompt_token_ids": request.prompt_token_ids,
        "params": asdict(request.params),
        "cache_salt": first.cache_salt,
        "streams": request.streams,
        "priority": first.priority,
        "tenant": first.tenant,
        "expected_output_len": first.expected_output_len,
        "seeds": [one.sequence.seed for one in request.continuations],
    }


def call_record(kind: str, **arguments: Any) -> Record:
    """A call and what it was given."""
    return {"kind": kind, **arguments}


def step_record(plan: StepPlan, step: int, owners: Owners) -> Record:
    """What was decided for a step: chunks [request, index, slot, start, length], pages [slot, column, page], copies
    [source, target], preempted sequences."""
    chunks = [[*_name(chunk.sequence, owners), chunk.sequence.slot, chunk.start, chunk.length] for chunk in plan.chunks]
    pages = {
        name: [[one.slot, one.column, one.page] for one in entries]
        for name, entries in (("new_pages", plan.new_pages), ("shared_pages", plan.shared_pages))
    }
    copies = [[copy.source, copy.target] for copy in plan.copies]
    moves = {
        name: [[one.page, one.place] for one in entries]
        for name, entries in (("offloads", plan.offloads), ("loads", plan.loads))
    }
    preempted = [_name(sequence, owners) for sequence in plan.preempted]
    return {"kind": "step", "step": step, "chunks": chunks, **pages, "copies": copies, **moves, "preempted": preempted}


def tokens_record(plan: StepPlan, token_ids: list[int], owners: Owners) -> Record:
    """What was read of a step: [request, index, token] of each sequence that had not ended; -1: none could be drawn."""
    drawn = [[*_name(sequence, owners), token_ids[row]] for row, sequence in plan.samples if sequence in owners]
    return {"kind": "tokens", "tokens": drawn}


def _name(sequence: Sequence, owners: Owners) -> list[Any]:
    request, continuation = owners[sequence]
    return [request.request_id, continuation.index]


def _dump(record: Record) -> str:
    # Parameters may hold numpy's numbers; whatever else a caller gave is refused by the engine, here and when replayed.
    return json.dumps(record, default=lambda value: getattr(value, "item", lambda: repr(value))())


def drive(engine: "LLMEngine", records: list[Record], until_step: int | None = None) -> int:
    """Calls a fresh engine as the log says, up to step until_step; how many records were repeated.

    Raises ReplayError for the first that is not. The engine is then, as after a return, open for inspection.
    """
    replayer = Replayer(records)
    engine.record = replayer.take
    try:
        while (record := replayer.next) is not None:
            before = replayer.num_done
            _call(engine, record)
            if replayer.num_done == before:
                raise ReplayError(f"record {record['number']} ({record['kind']}) is not repeated: nothing happened")
            if until_step is not None and engine.stats().num_steps >= until_step:
                break
    finally:
        engine.record = None
    return replayer.num_done


def _call(engine: "LLMEngine", record: Record) -> None:
    try:
        match record["kind"]:
            case "step":
                engine.step()
            case "add":
                params = SamplingParams.from_dict(record["params"])
                prompt, token_ids = record["prompt"], record["prompt_token_ids"]
                scheduling = ("priority", "tenant", "expected_output_len")
                rest = {name: record[name] for name in ("cache_salt", "streams", *scheduling)}
                engine.add_request(record["request_id"], token_ids, params, prompt, **rest)
            case "fork":
                rest = {name: record[name] for name in ("seed", "streams")}
                engine.fork(record["request_id"], record["new_request_id"], **rest)
            case "reset_prefix_cache":
                engine.reset_prefix_cache()
            case "abort":
                engine.abort(record["request_id"])
            case "rewind":
                # One that was refused, because the request had just ended, is refused again.
                with suppress(RequestError):
                    engine.rewind(record["request_id"], record["num_tokens"], seed=record["seed"])
            case "snapshot":
                engine.snapshot()
            case "sleep":
                engine.sleep(keep_cache=record["keep_cache"])
            case "start_over":
                engine.start_over(record["num_pages"], record["max_num_batched_tokens"])
            case "wake_up":
                engine.wake_up()
    except KeyError as error:
        raise ReplayError(f"record {record['number']} ({record['kind']}) has no {error}; it is damaged") from None
