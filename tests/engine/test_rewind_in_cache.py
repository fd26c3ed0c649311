"""What the prefix cache knows of a sequence that was rewound: new tokens lie under their own path, never the old."""

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.scheduler import Scheduler
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence


def make(sequence_id, prompt):
    params = SamplingParams(ignore_eos=True)
    return Sequence(sequence_id=sequence_id, prompt_token_ids=prompt, params=params, seed=0, max_len=30)


def draw(scheduler, tokens):
    copies = []
    for token in tokens:
        plan = scheduler.schedule()
        copies += plan.copies
        scheduler.update(plan, [token])
        scheduler.check()
    return copies


def start(page_size):
    """A scheduler, and its sequence of three prompt tokens and six drawn ones."""
    scheduler = Scheduler(
        PageAllocator(30),
        page_size=page_size,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        max_pages_per_sequence=15,
        enable_prefix_caching=True,
    )
    sequence = make(0, [1, 2, 3])
    scheduler.add(sequence)
    draw(scheduler, [10, 11, 12, 13, 14, 15])
    return scheduler, sequence


def test_new_tokens_get_a_path_of_their_own():
    scheduler, sequence = start(page_size=2)
    old_pages = list(sequence.pages)
    scheduler.rewind(sequence, 4)  # 10 and 11 are left: the page of 11 and 12 is full, and stays in the cache
    assert sequence.pages == old_pages[:2]
    copies = draw(scheduler, [20, 21, 22, 23])
    assert not copies and sequence.token_ids == [1, 2, 3, 10, 11, 20, 21, 22, 23]
    assert scheduler.prefix_cache.match(sequence, 8).pages == sequence.pages[:4]
    for tokens, pages in (
        ([1, 2, 3, 10, 11, 12, 13, 14, 99], old_pages[:4]),
        ([1, 2, 3, 10, 11, 20, 21, 22, 99], sequence.pages[:4]),
        ([1, 2, 3, 10, 11, 12, 21, 22, 99], old_pages[:3]),
    ):
        assert scheduler.prefix_cache.match(make(1, tokens), len(tokens) - 1).pages == pages


def test_what_the_cache_holds_is_copied_before_it_is_written():
    scheduler, sequence = start(page_size=4)
    old_pages = list(sequence.pages)
    scheduler.rewind(sequence, 3)  # into the second page, of 11 to 14, which is full and in the cache
    [copy] = draw(scheduler, [20, 21, 22])
    assert copy.source == old_pages[1] and sequence.pages[1] == copy.target != old_pages[1]
    assert scheduler.prefix_cache.match(make(1, [1, 2, 3, 10, 11, 12, 13, 14, 99]), 8).pages == old_pages[:2]
