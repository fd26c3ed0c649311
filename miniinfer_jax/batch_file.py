"""A file of requests in, a file of results out: any size in constant memory, killed at any moment and gone on with.

Every result line carries the number of its request's line ("line", from 1) and a checksum of that line
("input_crc32"). What is done is read back from the results themselves, so there is no second file to keep in step.
"""

import fcntl
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from miniinfer_jax.batch_lines import BatchLineError, BatchRequest, error_line, parse_line, result_line
from miniinfer_jax.engine.validation import encode
from miniinfer_jax.outputs import RequestOutput
from miniinfer_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from miniinfer_jax.llm import LLM

SYNC_SECONDS = 1.0  # a killed process loses nothing; a machine that loses power at most this much
LINE_START = b'{"line": '
MAX_CHECKED_LINES = 1000  # of an earlier run's results, against the input


class LineNumbers:
    """A set of line numbers that grows roughly in order, in memory that the disorder alone decides."""

    def __init__(self) -> None:
        self._all_up_to = 0
        self._beyond: set[int] = set()

    def add(self, number: int) -> None:
        self._beyond.add(number)
        while self._all_up_to + 1 in self._beyond:
            self._all_up_to += 1
            self._beyond.remove(self._all_up_to)

    def __contains__(self, number: int) -> bool:
        return number <= self._all_up_to or number in self._beyond


@dataclass
class BatchSummary:
    """What one run did: lines answered and lines failed now, lines found done, tokens and seconds of this run."""

    num_finished: int = 0
    num_failed: int = 0
    num_already_done: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    seconds: float = 0.0


class ResultFile:
    """The results so far, opened for adding to; one process at a time.

    A last line that a kill cut short is removed. Raises ValueError for a file that holds anything else than
    results of `input_path`.
    """

    def __init__(self, file: IO[bytes], path: Path, input_path: Path):
        self._file = file
        self._synced_at = time.monotonic()
        self.done = LineNumbers()
        self.num_done = 0
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {path}; wait for it, or choose another output") from None
        _check_same_input(path, input_path, self._read_back(path))

    def _read_back(self, path: Path) -> dict[int, int]:
        """Fills `done`, cuts off a torn last line; returns checksums of the first lines by number."""
        checksums: dict[int, int] = {}
        end = 0
        with open(path, "rb") as lines:
            for line in lines:
                is_torn = not line.endswith(b"\n")
                if is_torn and (line.startswith(LINE_START) or LINE_START.startswith(line)):
                    break
                number, checksum = _read_identity(path, line)
                if len(checksums) < MAX_CHECKED_LINES:
                    checksums[number] = checksum
                self.num_done += number not in self.done
                self.done.add(number)
                end += len(line)
        self._file.truncate(end)
        return checksums

    def write(self, number: int, line: bytes, result: dict[str, Any]) -> None:
        """Adds the result of input line `number`, in one write."""
        identity = {"line": number, "input_crc32": zlib.crc32(line)}
        text = json.dumps({**identity, **result}, ensure_ascii=False) + "\n"
        # A lone surrogate has no UTF-8; its backslash form is the one that JSON reads back.
        _write_all(self._file, text.encode("utf-8", "backslashreplace"))
        self.done.add(number)
        if time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()


def _write_all(file: IO[bytes], data: bytes) -> None:
    """A disk that fills up takes a part and then raises: the torn line is cut off by the next run."""
    while data:
        data = data[file.write(data) :]


def _read_identity(path: Path, line: bytes) -> tuple[int, int]:
    try:
        values = json.loads(line)
        return int(values["line"]), int(values["input_crc32"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} exists and holds something else than results; choose another output") from None


def _check_same_input(path: Path, input_path: Path, checksums: dict[int, int]) -> None:
    remaining = dict(checksums)
    with open(input_path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not remaining:
                return
            if remaining.pop(number, None) not in (None, zlib.crc32(line)):
                raise ValueError(f"{path} holds results of another input: line {number} of {input_path} differs")
    if remaining:
        raise ValueError(f"{path} holds results of another input: {input_path} has no line {min(remaining)}")


@contextmanager
def open_results(path: Path, input_path: Path) -> Iterator[ResultFile]:
    """The result file of a run, synced and closed at the end whatever happens."""
    if not input_path.is_file():
        raise ValueError(f"input {input_path} does not exist or is not a file")
    if path.exists() and path.samefile(input_path):
        raise ValueError(f"input and output are the same file ({path}); choose another output")
    with open(path, "a+b", buffering=0) as file:
        results = ResultFile(file, path, input_path)
        try:
            yield results
        finally:
            results.sync()


def read_pending(input_path: Path, done: LineNumbers) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is neither done nor blank."""
    with open(input_path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number not in done and line.strip():
                yield number, line


def count_requests(input_path: Path) -> int:
    with open(input_path, "rb") as lines:
        return sum(1 for line in lines if line.strip())


@dataclass(frozen=True)
class _InFlight:
    number: int
    line: bytes
    request: BatchRequest


class BatchRun:
    """Keeps a window of requests in the engine and writes each as it finishes."""

    def __init__(
        self,
        llm: "LLM",
        results: ResultFile,
        defaults: Mapping[str, Any],
        seed: int,
        summary: BatchSummary,
        progress: tqdm,
    ):
        self._llm = llm
        self._engine = llm.engine
        self._results = results
        self._defaults = defaults
        self._seed = seed
        self._summary = summary
        self._progress = progress
        self._started_at = time.monotonic()
        self._in_flight: dict[str, _InFlight] = {}

    def run(self, pending: Iterator[tuple[int, bytes]], window: int) -> None:
        """Runs every pending line; at most `window` of them are in memory."""
        is_more = True
        try:
            while is_more or self._in_flight:
                while is_more and len(self._in_flight) < window:
                    line = next(pending, None)
                    is_more = line is not None
                    if line is not None:
                        self._start(*line)
                for output in self._engine.step() if self._in_flight else ():
                    if output.finished:
                        self._finish(output)
        finally:
            for request_id in self._in_flight:
                self._engine.abort(request_id)

    def _start(self, number: int, line: bytes) -> None:
        # A draw depends on the line alone: not on the neighbours, not on how often the run was killed.
        seed = zlib.crc32(f"{self._seed}:{number}".encode())
        request_id = f"batch-{number}"
        custom_id = url = None
        try:
            request = parse_line(line.decode("utf-8"), {**self._defaults, "seed": seed})
            custom_id, url = request.custom_id, request.url
            token_ids = prompt_token_ids(self._llm, request)
            self._engine.add_request(
                request_id, token_ids, request.params, request.prompt, cache_salt=request.cache_salt, streams=False
            )
        except ValueError as error:
            if isinstance(error, BatchLineError):
                custom_id, url = error.custom_id, error.url
            self._write(number, line, error_line(error, custom_id, url, request_id), failed=True)
        else:
            self._in_flight[request_id] = _InFlight(number, line, request)

    def _finish(self, output: RequestOutput) -> None:
        entry = self._in_flight.pop(output.request_id)
        result = result_line(entry.request, output, output.request_id, self._llm.model_config.architecture)
        self._summary.num_prompt_tokens += len(output.prompt_token_ids)
        self._summary.num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self._write(entry.number, entry.line, result, failed=output.error is not None)

    def _write(self, number: int, line: bytes, result: dict[str, Any], failed: bool) -> None:
        self._results.write(number, line, result)
        self._summary.num_failed += failed
        self._summary.num_finished += not failed
        rate = self._summary.num_output_tokens / (time.monotonic() - self._started_at)
        self._progress.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._progress.update()


def prompt_token_ids(llm: "LLM", request: BatchRequest) -> list[int]:
    """The request's prompt as token ids, by the chat template for messages. Raises ValueError."""
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    if request.messages is not None:
        return llm.apply_chat_template(request.messages)
    if llm.tokenizer is None:
        raise ValueError("this model has no tokenizer: give prompt_token_ids")
    assert request.prompt is not None
    return encode(llm.tokenizer, request.prompt)


def run_batch_file(
    open_llm: "Callable[[], LLM]",
    input_path: Path,
    output_path: Path,
    defaults: Mapping[str, Any],
    *,
    window: int,
    seed: int = 0,
    use_tqdm: bool = True,
) -> BatchSummary:
    """Answers every line of `input_path` that `output_path` does not answer yet, in order of finishing.

    open_llm: makes the LLM, called once both files and `defaults` are known to be good and only if a line is left;
    defaults: sampling parameters of lines that do not name them; window: requests in memory at a time;
    seed: with the line's number, of the draws of a line that names no seed. Raises ValueError for an output
    that belongs to another input.
    """
    SamplingParams.from_dict(defaults)
    started_at = time.monotonic()
    with open_results(output_path, input_path) as results:
        summary = BatchSummary(num_already_done=results.num_done)
        total = count_requests(input_path)
        if results.num_done < total:
            llm = open_llm()
            with tqdm(total=total, initial=results.num_done, unit="line", disable=not use_tqdm) as progress:
                run = BatchRun(llm, results, defaults, seed, summary, progress)
                run.run(read_pending(input_path, results.done), window)
    summary.seconds = time.monotonic() - started_at
    return summary
