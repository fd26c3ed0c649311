"""The host's side of a generation: `Sequence`, and `StepPlan`, what the scheduler decides. Standard library only."""

import enum
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from miniinfer_jax.sampling_params import SamplingParams


class SequenceStatus(enum.Enum):
    WAITING = "waiting"  # no slot and no pages; also after preemption
    RUNNING = "running"  # holds a slot and pages
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One token sequence being continued. Its life: WAITING -> RUNNING (-> WAITING when preempted ...) -> FINISHED.

    Tokens, from left to right:

        [ prompt | outputs read back | sampled but still on the device ]
         <---------- token_ids ----> <------- num_in_flight -------->
         <------- num_computed ------------>   (their keys and values are in pages, or dispatched to be)

    While decoding, num_computed == num_tokens - 1: only the newest token has not been through the model.
    """

    sequence_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_len: int  # prompt and outputs together: by max_tokens and max_model_len
    eos_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # params.bad_words as token ids
    cache_salt: str | None = None  # pages are found again under the same salt alone
    parent: "Sequence | None" = None  # whose tokens it goes on from; until it starts, and then shares its pages
    priority: int = 0  # the smaller, the more urgent
    tenant: str = ""  # whom it is served for
    expected_output_len: int | None = None  # somebody's guess; None: none but max_len
    output_token_ids: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_in_flight: int = 0
    prefill_start: int = 0  # tokens found in pages when the sequence was admitted
    prefill_len: int = 0  # tokens to compute before decoding, those included; set when the sequence is admitted
    may_share_part: bool = False  # others may hold its part-filled page too; who writes to it first gets a copy
    last_chunk_start: int = 0  # what stands before it is written by earlier steps than its latest
    num_cached_tokens: int = 0  # prefill_start as it was the first time, of the prompt
    num_unscored: int = 0  # tokens at the prompt's end whose log-probabilities are wanted and not yet read
    num_preemptions: int = 0
    arrival: int = 0  # tokens that the scheduler had planned before it came
    num_charged: int = 0  # tokens that a policy has counted as served before it decoded, also before a preemption
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    stop_token_ids: tuple[int, ...] = field(init=False)  # all that end it, and that min_tokens holds back

    def __post_init__(self) -> None:
        own = tuple(self.params.stop_token_ids or ())
        self.stop_token_ids = own if self.params.ignore_eos else own + self.eos_token_ids

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids

    def tokens_between(self, start: int, end: int) -> list[int]:
        """token_ids[start:end], without putting all tokens together for it."""
        prompt_len = self.prompt_len
        outputs = self.output_token_ids[max(0, start - prompt_len) : max(0, end - prompt_len)]
        return self.prompt_token_ids[start:end] + outputs

    @property
    def max_shared_len(self) -> int:
        """How many tokens may be taken from pages of others: the last is computed to draw from it, and a token of the
        prompt to score the one behind it."""
        if self.num_unscored:
            return self.prompt_len - 1 - self.num_unscored
        return self.num_known_tokens - 1

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_known_tokens + self.num_in_flight

    @property
    def is_decoding(self) -> bool:
        return self.status is SequenceStatus.RUNNING and self.num_computed >= self.prefill_len

    @property
    def is_full(self) -> bool:
        """No further token may be sampled: those in flight complete it."""
        return self.num_tokens >= self.max_len

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def fork(self, sequence_id: int, seed: int) -> "Sequence":
        """A waiting sequence that goes on, with draws of its own, from the tokens that are known of this one."""
        return replace(
            self,
            sequence_id=sequence_id,
            seed=seed,
            parent=self,
            output_token_ids=list(self.output_token_ids),
            status=SequenceStatus.WAITING,
            slot=None,
            pages=[],
            num_computed=0,
            num_in_flight=0,
            num_preemptions=0,
            may_share_part=False,
        )

    def append(self, token_id: int) -> None:
        """Takes the oldest in-flight token, now read back, and says in finish_reason whether it ends the sequence."""
        self.num_in_flight -= 1
        self.output_token_ids.append(token_id)
        num_outputs = len(self.output_token_ids)
        if token_id in self.stop_token_ids and num_outputs >= self.params.min_tokens:
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in (self.params.stop_token_ids or ()) else None
        elif len(self.prompt_token_ids) + num_outputs >= self.max_len:
            self.finish_reason = "length"


class Chunk(NamedTuple):
    """Tokens [start, start + length) of a sequence that go through the model in one step.

    A decoding sequence is a chunk of one token, which is already on the device. `samples`: the chunk ends at
    the sequence's last token, so that the step draws the next one. A chunk of no tokens stands behind the one of its
    parent and draws from the same last token.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool
    is_decode: bool
    is_first: bool = False  # since its sequence was admitted


class NewPage(NamedTuple):
    """Page `page` becomes column `column` of the page table of slot `slot`."""

    slot: int
    column: int
    page: int


@dataclass(frozen=True)
class PageCopy:
    """Page `target` gets what `source` holds."""

    source: int
    target: int


@dataclass(frozen=True)
class HostCopy:
    """Page `page` of the pool goes to, or comes from, place `place` in host memory."""

    page: int
    place: int


@dataclass
class StepPlan:
    """What one step computes. Empty chunks: nothing to do.

    Before the step, in this order, evicted pages go to host memory, pages come back from where they were in host memory
    before that, pages are copied, and shared_pages, which hold tokens already, enter the page tables; new_pages
    enter them with the step.
    """

    chunks: list[Chunk] = field(default_factory=list)
    new_pages: list[NewPage] = field(default_factory=list)
    shared_pages: list[NewPage] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    offloads: list[HostCopy] = field(default_factory=list)
    loads: list[HostCopy] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def is_decode_only(self) -> bool:
        return all(chunk.is_decode for chunk in self.chunks)

    @property
    def is_plain(self) -> bool:
        """Whether nobody in it asks for more than a temperature."""
        return all(chunk.sequence.params.is_plain for chunk in self.chunks)

    @property
    def samples(self) -> list[tuple[int, Sequence]]:
        """(index among the chunks, sequence) of each chunk that draws a token."""
        return [(index, chunk.sequence) for index, chunk in enumerate(self.chunks) if chunk.samples]

    @property
    def num_tokens(self) -> int:
        return sum([chunk.length for chunk in self.chunks])
