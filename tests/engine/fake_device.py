"""A device without arrays: what it draws follows from seed and position, if the pages hold what they must.

It believes nothing of the host but the plan: it copies pages, writes tokens into pages through the page table that the
NewPage events gave it, and reads a sequence's whole context back from there before it draws.
"""

from miniinfer_jax.sequence import Chunk, Sequence, StepPlan

EOS = 0
STOP_TOKEN = 1
VOCAB_SIZE = 64
COPIES_A_CALL = 2  # fewer than the real device's: plans then need several


def draw(seed: int, position: int) -> int:
    """The token at `position` of the sequence with `seed`, whatever else goes on."""
    return (seed * 7919 + position * position * 31 + position * seed) % 1009 % VOCAB_SIZE


def expected_outputs(sequence: Sequence, inherited: list[int]) -> list[int]:
    """What the sequence, forked with the outputs `inherited`, gives when nothing interferes, by the rules of
    SamplingParams alone."""
    outputs = list(inherited)
    while sequence.prompt_len + len(outputs) < sequence.max_len:
        outputs.append(draw(sequence.seed, sequence.prompt_len + len(outputs)))
        may_stop = len(outputs) >= sequence.params.min_tokens
        if may_stop and outputs[-1] in ((STOP_TOKEN,) if sequence.params.ignore_eos else (EOS, STOP_TOKEN)):
            break
    return outputs


class FakeDevice:
    """Pages, page tables and last tokens, changed by plans in order."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[int, dict[int, tuple[int, str | None]]] = {}  # page -> offset -> (token, salt)
        self.host: dict[int, dict[int, tuple[int, str | None]]] = {}  # what places in host memory hold
        self.page_tables: dict[int, dict[int, int]] = {}  # slot -> column -> page
        self.last_tokens: dict[int, int] = {}  # by slot
        self.inherited: dict[Sequence, list[int]] = {}  # outputs that a fork began with

    def run(self, plan: StepPlan) -> list[int]:
        """Executes a plan: the tokens of its sampling chunks."""
        sent = {copy.place: dict(self.pages[copy.page]) for copy in plan.offloads}
        self.pages |= {copy.page: dict(self.host[copy.place]) for copy in plan.loads}
        self.host |= sent
        for first in range(0, len(plan.copies), COPIES_A_CALL):
            copies = plan.copies[first : first + COPIES_A_CALL]
            held = [dict(self.pages[copy.source]) for copy in copies]
            self.pages |= {copy.target: content for copy, content in zip(copies, held, strict=True)}
        for new in (*plan.shared_pages, *plan.new_pages):
            self.page_tables.setdefault(new.slot, {})[new.column] = new.page
        for new in plan.new_pages:
            if new.page not in {copy.target for copy in plan.copies}:
                self.pages[new.page] = {}  # whatever it held, nobody may rely on it
        for chunk in plan.chunks:
            self.write(chunk)
        return [self.sample(index, plan) for index, chunk in enumerate(plan.chunks) if chunk.samples]

    def true_tokens(self, sequence: Sequence, length: int) -> list[int]:
        """The first tokens of a sequence as they are when nothing interferes."""
        known = sequence.prompt_token_ids + self.inherited.get(sequence, [])
        return [*known, *(draw(sequence.seed, position) for position in range(len(known), length))][:length]

    def write(self, chunk: Chunk) -> None:
        slot = chunk.sequence.slot
        assert slot is not None
        tokens = chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]
        if chunk.is_decode:
            tokens = [self.last_tokens[slot]]
        assert len(tokens) == chunk.length, "a prefill needs tokens that the host does not know"
        for position, token_id in enumerate(tokens, chunk.start):
            page = self.page_tables[slot][position // self.page_size]
            self.pages[page][position % self.page_size] = (token_id, chunk.sequence.cache_salt)

    def sample(self, index: int, plan: StepPlan) -> int:
        chunk = plan.chunks[index]
        sequence, end, slot = chunk.sequence, chunk.start + chunk.length, chunk.sequence.slot
        assert slot is not None
        row = self.page_tables[slot]
        context = [self.pages[row[at // self.page_size]][at % self.page_size] for at in range(end)]
        expected = [(token_id, sequence.cache_salt) for token_id in self.true_tokens(sequence, end)]
        assert context == expected, "the pages hold another context"
        if chunk.length == 0:  # it draws from the last token in front of it on the flat axis
            leader = next(one for one in reversed(plan.chunks[:index]) if one.length > 0)
            assert leader.start + leader.length == end
            assert self.true_tokens(leader.sequence, end) == self.true_tokens(sequence, end)
        self.last_tokens[slot] = draw(sequence.seed, end)
        return self.last_tokens[slot]
