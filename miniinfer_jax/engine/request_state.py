"""A request as a value: `RequestState`, taken of a `Request` and made into one again, and its form in JSON."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from miniinfer_jax.engine.detokenizer import Detokenizer
from miniinfer_jax.engine.request import Continuation, Request
from miniinfer_jax.outputs import Logprob, PositionLogprobs
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class SequenceState:
    """One continuation of a request: what it drew, and which pages hold its first num_computed tokens."""

    seed: int
    max_len: int
    output_token_ids: tuple[int, ...]
    num_computed: int
    page_table: tuple[int, ...]  # rows of Snapshot.pages
    num_preemptions: int
    num_cached_tokens: int
    finish_reason: str | None
    stop_reason: int | str | None
    text: str | None  # of an ended one; that of a running one follows from its tokens
    logprobs: tuple[PositionLogprobs, ...] | None
    cumulative_logprob: float


@dataclass(frozen=True)
class RequestState:
    """What was asked and how far it is; ages are seconds since the request came."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    cache_salt: str | None
    priority: int
    tenant: str
    expected_output_len: int | None
    streams: bool
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None
    age: float
    first_token_age: float | None
    sequences: tuple[SequenceState, ...]


def state_of(request: Request, rows: Mapping[int, int]) -> RequestState:
    """The request as it stands, none of its tokens in flight; page p of the pool is row rows[p] of the snapshot."""
    arrival, first_token = request.arrival_time, request.first_token_time
    first = request.continuations[0].sequence
    return RequestState(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=tuple(request.prompt_token_ids),
        params=request.params,
        cache_salt=first.cache_salt,
        priority=first.priority,
        tenant=first.tenant,
        expected_output_len=first.expected_output_len,
        streams=request.streams,
        prompt_logprobs=None if request.prompt_logprobs is None else tuple(request.prompt_logprobs),
        age=time.monotonic() - arrival,
        first_token_age=None if first_token is None else first_token - arrival,
        sequences=tuple(_sequence_state(continuation, rows) for continuation in request.continuations),
    )


def _sequence_state(continuation: Continuation, rows: Mapping[int, int]) -> SequenceState:
    sequence, detokenizer = continuation.sequence, continuation.detokenizer
    assert sequence.num_in_flight == 0, "the steps in flight must be read first"
    return SequenceState(
        seed=sequence.seed,
        max_len=sequence.max_len,
        output_token_ids=tuple(sequence.output_token_ids),
        num_computed=sequence.num_computed,
        page_table=tuple(rows[page] for page in sequence.pages),
        num_preemptions=sequence.num_preemptions,
        num_cached_tokens=sequence.num_cached_tokens,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        text=detokenizer.text if detokenizer is not None and sequence.is_finished else None,
        logprobs=None if continuation.logprobs is None else tuple(continuation.logprobs),
        cumulative_logprob=continuation.cumulative_logprob,
    )


MakeSequence = Callable[[int, list[int], SamplingParams, str | None, Sequence | None], Sequence]


def request_of(state: RequestState, make_sequence: MakeSequence, tokenizer: Any) -> Request:
    """The request again, with nothing computed yet. make_sequence takes (index, prompt, params, salt, parent)."""
    prompt, params, sequences = list(state.prompt_token_ids), state.params, []
    for index in range(len(state.sequences)):
        sequence = make_sequence(index, prompt, params, state.cache_salt, sequences[0] if sequences else None)
        sequence.priority, sequence.tenant = state.priority, state.tenant
        sequence.expected_output_len = state.expected_output_len
        sequences.append(sequence)
    continuations = [
        _continuation(index, one, sequence, tokenizer)
        for index, (one, sequence) in enumerate(zip(state.sequences, sequences, strict=True))
    ]
    prompt_logprobs = None if state.prompt_logprobs is None else list(state.prompt_logprobs)
    if prompt_logprobs is not None:
        sequences[0].num_unscored = len(prompt) - len(prompt_logprobs)
    request = Request(state.request_id, state.prompt, prompt, params, continuations, state.streams, prompt_logprobs)
    request.arrival_time -= state.age
    if state.first_token_age is not None:
        request.first_token_time = request.arrival_time + state.first_token_age
    return request


def _continuation(index: int, state: SequenceState, sequence: Sequence, tokenizer: Any) -> Continuation:
    sequence.seed, sequence.max_len = state.seed, state.max_len
    sequence.output_token_ids = list(state.output_token_ids)
    sequence.num_preemptions, sequence.num_cached_tokens = state.num_preemptions, state.num_cached_tokens
    sequence.finish_reason, sequence.stop_reason = state.finish_reason, state.stop_reason
    if state.finish_reason is not None:
        sequence.status = SequenceStatus.FINISHED
    detokenizer = Detokenizer.of(tokenizer, sequence.params, sequence.output_token_ids)
    if detokenizer is not None and state.text is not None:
        detokenizer.text = state.text
    logprobs = None if state.logprobs is None else list(state.logprobs)
    return Continuation(index, sequence, detokenizer, logprobs, state.cumulative_logprob)


def request_to_json(state: RequestState) -> dict[str, Any]:
    """The state in JSON's types; log-probabilities as lists, because JSON's keys are texts."""
    values = asdict(state)
    values["prompt_logprobs"] = _logprobs_to_json(state.prompt_logprobs)
    for sequence, one in zip(values["sequences"], state.sequences, strict=True):
        sequence["logprobs"] = _logprobs_to_json(one.logprobs)
    return values


def request_from_json(values: dict[str, Any]) -> RequestState:
    """What `request_to_json` was given. Raises KeyError for an entry that is missing."""
    plain = {field.name: values[field.name] for field in fields(RequestState)}
    plain["prompt_token_ids"] = tuple(plain["prompt_token_ids"])
    plain["params"] = SamplingParams.from_dict(plain["params"])
    plain["prompt_logprobs"] = _logprobs_from_json(plain["prompt_logprobs"])
    plain["sequences"] = tuple(map(_sequence_from_json, plain["sequences"]))
    return RequestState(**plain)


def _sequence_from_json(values: dict[str, Any]) -> SequenceState:
    plain = {field.name: values[field.name] for field in fields(SequenceState)}
    for name in ("output_token_ids", "page_table"):
        plain[name] = tuple(plain[name])
    plain["logprobs"] = _logprobs_from_json(plain["logprobs"])
    return SequenceState(**plain)


def _logprobs_to_json(positions: tuple[PositionLogprobs | None, ...] | None) -> list[Any] | None:
    """One list a position: [token id, log-probability, rank, text] of each entry; null for a position without."""
    if positions is None:
        return None
    return [
        position and [[token_id, one.logprob, one.rank, one.decoded_token] for token_id, one in position.items()]
        for position in positions
    ]


def _logprobs_from_json(positions: list[Any] | None) -> Any:
    if positions is None:
        return None
    return tuple(position and {row[0]: Logprob(*row[1:]) for row in position} for position in positions)
