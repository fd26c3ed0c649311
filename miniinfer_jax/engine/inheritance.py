"""What a sequence takes over from its parent: the other samples of a request, and forks, start where it stands."""

from miniinfer_jax.engine.prefix_cache import Prefix
from miniinfer_jax.sequence import Sequence, SequenceStatus, StepPlan


def inherited_prefix(sequence: Sequence, plan: StepPlan, page_size: int) -> Prefix:
    """What a running parent has computed of a waiting sequence's tokens; nothing if it does not run.

    Whole pages may be shared while the step that fills them is planned; a part is copied before that step. So it ends
    where the parent's latest chunk began, is not taken of a parent that starts in this plan, whose pages others may
    still have to fill, and if the page is to be a copy itself, is taken where that comes from.
    """
    parent = sequence.parent
    if parent is None or not _agrees(parent, sequence):
        return Prefix([], 0)
    max_len = min(sequence.max_shared_len, parent.num_computed)
    num_full = max_len // page_size
    whole = Prefix(parent.pages[:num_full], num_full * page_size)
    num_written = min(max_len, parent.last_chunk_start)
    if num_written <= whole.num_tokens or any(chunk.sequence is parent and chunk.is_first for chunk in plan.chunks):
        return whole
    page = parent.pages[num_full]
    sources = {copy.target: copy.source for copy in plan.copies}
    return Prefix(whole.pages, num_written, part_page=sources.get(page, page))


def place_behind_parent(sequence: Sequence, plan: StepPlan) -> int | None:
    """The place behind the chunk that ends its parent's prefill with just the tokens of a waiting sequence, if planned.

    The sequence needs no more than a draw of its own from that chunk's last token.
    """
    parent = sequence.parent
    if parent is None or sequence.num_unscored or parent.num_computed != sequence.num_known_tokens:
        return None
    for index, chunk in enumerate(plan.chunks):
        if chunk.sequence is parent and chunk.samples and not chunk.is_decode and _agrees(parent, sequence):
            return index + 1
    return None


def _agrees(parent: Sequence, sequence: Sequence) -> bool:
    """Whether the parent runs, and its tokens still begin with those of the sequence."""
    outputs = sequence.output_token_ids
    return (
        parent.status is SequenceStatus.RUNNING
        and parent.prompt_token_ids is sequence.prompt_token_ids
        and parent.output_token_ids[: len(outputs)] == outputs
    )
