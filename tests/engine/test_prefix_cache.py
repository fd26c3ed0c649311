"""The tree of prefixes by itself: what is found, what is shared, what goes first when pages are needed."""

import hashlib
import struct

import pytest

from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.prefix_cache import Prefix, PrefixCache
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence

PAGE_SIZE = 4


def make_cache(num_pages: int = 16, enabled: bool = True) -> PrefixCache:
    return PrefixCache(PageAllocator(num_pages), PAGE_SIZE, enabled=enabled)


def make_sequence(tokens: list[int], salt: str | None = None) -> Sequence:
    return Sequence(0, tokens, SamplingParams(), seed=0, max_len=len(tokens) + 8, cache_salt=salt)


def compute(cache: PrefixCache, tokens: list[int], salt: str | None = None) -> Sequence:
    """A sequence that finds what it can, computes the rest in a plan of its own, and still runs."""
    cache.begin_plan()
    sequence = make_sequence(tokens, salt)
    prefix = cache.match(sequence, len(tokens) - 1)
    cache.share(prefix.pages)
    num_new = -(-len(tokens) // PAGE_SIZE) - len(prefix.pages)
    sequence.pages = prefix.pages + cache.allocate(num_new)
    sequence.num_computed = len(tokens)
    cache.insert(sequence)
    return sequence


def end(cache: PrefixCache, *sequences: Sequence) -> None:
    for sequence in sequences:
        cache.insert(sequence)
        cache.release(sequence.pages)
        cache.leave(sequence)
        sequence.pages = []


def find(cache: PrefixCache, tokens: list[int], salt: str | None = None) -> Prefix:
    cache.begin_plan()
    return cache.match(make_sequence(tokens, salt), len(tokens))


def test_the_longest_common_prefix_is_found_page_by_page():
    cache = make_cache()
    one = compute(cache, list(range(14)))
    assert find(cache, list(range(12))) == Prefix(one.pages[:3], 12)
    assert find(cache, [*range(8), 90, 91, 92, 93]) == Prefix(one.pages[:2], 8)
    assert find(cache, [*range(1, 9)]) == Prefix([], 0)
    assert find(cache, list(range(14))) == Prefix(one.pages[:3], 12)  # the part-filled page is its owner's


def test_a_hit_that_ends_inside_a_page_names_the_page_to_copy():
    cache = make_cache()
    one = compute(cache, list(range(12)))
    assert find(cache, list(range(11))) == Prefix(one.pages[:2], 11, part_page=one.pages[2])
    assert find(cache, [0, 1, 2, 90, 91, 92]) == Prefix([], 3, part_page=one.pages[0])
    assert find(cache, [0]) == Prefix([], 1, part_page=one.pages[0])


def test_of_many_pages_that_begin_alike_the_one_with_most_in_common_is_copied():
    cache = make_cache(num_pages=64)
    runs = [[5, 5, 5, 5], [5, 5, 7, 1], [5, 5, 7, 9], [5, 6, 0, 0], [1, 1, 1, 1]]
    pages = {tuple(run): compute(cache, [1, 2, 3, 4, *run, 0]).pages[1] for run in runs}
    for tail in ([5, 5, 7, 8], [5, 5, 7, 0], [5, 5, 7, 99]):
        prefix = find(cache, [1, 2, 3, 4, *tail])
        assert prefix.num_tokens == 7
        assert prefix.part_page in (pages[5, 5, 7, 1], pages[5, 5, 7, 9])
    assert find(cache, [1, 2, 3, 4, 5, 6, 1]).part_page == pages[5, 6, 0, 0]
    assert find(cache, [1, 2, 3, 4, 6]).num_tokens == 4


def test_a_page_of_the_plan_at_hand_is_shared_whole_and_never_copied():
    cache = make_cache()
    one = compute(cache, list(range(8)))
    assert cache.match(make_sequence(list(range(8))), 8) == Prefix(one.pages, 8)
    assert cache.match(make_sequence(list(range(7))), 7) == Prefix(one.pages[:1], 4)
    assert find(cache, list(range(7))) == Prefix(one.pages[:1], 7, part_page=one.pages[1])


def test_no_more_than_allowed_is_found_and_a_waiting_sequence_goes_on_from_there():
    cache = make_cache()
    one = compute(cache, list(range(16)))
    cache.begin_plan()
    waiting = make_sequence(list(range(16)))
    assert cache.match(waiting, 0) == Prefix([], 0)
    assert cache.match(waiting, 8) == Prefix(one.pages[:2], 8)
    assert cache.match(waiting, 15) == Prefix(one.pages[:3], 15, part_page=one.pages[3])
    assert cache.match(waiting, 6) == Prefix(one.pages[:1], 6, part_page=one.pages[1])


def test_salts_see_nothing_of_one_another():
    cache = make_cache()
    plain, salted = compute(cache, list(range(8))), compute(cache, list(range(8)), salt="a")
    assert not set(plain.pages) & set(salted.pages)
    assert find(cache, list(range(8)), salt="a").pages == salted.pages
    assert find(cache, list(range(8)), salt="b") == Prefix([], 0)
    assert find(cache, list(range(8))).pages == plain.pages


def test_the_key_of_a_page_is_chained_over_salt_and_tokens():
    cache = make_cache()
    pages = compute(cache, list(range(8)), salt="a").pages
    key = hashlib.sha256(b"a").digest()
    for index, page in enumerate(pages):
        tokens = range(index * PAGE_SIZE, (index + 1) * PAGE_SIZE)
        key = hashlib.sha256(key + struct.pack("<4q", *tokens)).digest()
        assert cache._nodes[page].key == key
    other = compute(cache, list(range(8))).pages
    assert cache._nodes[other[1]].key != key


def test_pages_outlive_their_sequence_and_the_oldest_leaf_goes_first():
    cache = make_cache(num_pages=5)
    system = [7] * PAGE_SIZE
    old, young = compute(cache, [*system, 1, 1, 1, 1, 0]), compute(cache, [*system, 2, 2, 2, 2])
    first_page, old_page, young_page = old.pages[0], old.pages[1], young.pages[1]
    end(cache, old)
    end(cache, young)
    assert (cache.allocator.num_free, cache.allocator.num_cached) == (2, 3)
    taken = cache.allocate(3)
    assert old_page in taken and cache.num_evictions == 1
    assert find(cache, [*system, 2, 2, 2, 2]).pages == [first_page, young_page]
    taken += cache.allocate(1)
    assert young_page in taken and find(cache, system).pages == [first_page]
    assert first_page in cache.allocate(1)
    assert find(cache, system) == Prefix([], 0)
    assert not cache._roots and not cache._nodes


def test_a_hit_makes_a_page_young_again():
    cache = make_cache(num_pages=4)
    end(cache, compute(cache, [1, 1, 1, 1]))
    end(cache, compute(cache, [2, 2, 2, 2]))
    end(cache, compute(cache, [1, 1, 1, 1, 1]))
    cache.allocate(cache.allocator.num_free + 1)
    assert find(cache, [1, 1, 1, 1]).num_tokens == 4
    assert find(cache, [2, 2, 2, 2]).num_tokens == 0


def test_what_somebody_holds_is_not_evicted():
    cache = make_cache(num_pages=3)
    held = compute(cache, [1] * 8)
    end(cache, compute(cache, [2] * 4))
    cache.allocate(1)
    assert cache.num_available == 0
    with pytest.raises(RuntimeError, match="1 pages asked for, 0 of 3 are free"):
        cache.allocate(1)
    assert find(cache, [1] * 8).pages == held.pages


def test_a_page_computed_twice_stays_the_first_ones_and_can_be_evicted_under_the_other():
    """The child of a cached page may be in use by somebody who has a page of his own in its place."""
    cache = make_cache(num_pages=6)
    cache.begin_plan()
    twins = [make_sequence([1] * 4 + [index] * 4) for index in (2, 3)]
    for twin in twins:  # both compute the first page: neither has looked for it
        twin.pages, twin.num_computed = cache.allocate(2), 8
        cache.insert(twin)
    first, second = twins
    assert find(cache, [1] * 4).pages == first.pages[:1]
    first_page = first.pages[0]
    end(cache, first)
    cache.check([second.pages])
    assert cache.num_available == 4
    assert first_page in cache.allocate(4)
    assert find(cache, [1] * 4) == Prefix([], 0)
    cache.insert(second)  # what it holds is as good
    assert find(cache, [1] * 4 + [3] * 4).pages == second.pages


def test_forgetting_a_sequence_takes_its_path_and_what_hangs_below():
    cache = make_cache()
    other = compute(cache, [9] * 8)
    bad, follower = compute(cache, [1] * 8), compute(cache, [1] * 8 + [2] * 4)
    cache.forget(bad)
    cache.check([bad.pages, follower.pages, other.pages])
    assert find(cache, [1] * 8) == Prefix([], 0)
    assert find(cache, [9] * 8).pages == other.pages
    cache.release(bad.pages)
    assert cache.allocator.num_cached == 0
    cache.insert(follower)  # it runs on, and what it holds is good
    assert find(cache, [1] * 8).pages == follower.pages[:2]


def test_clearing_leaves_running_sequences_their_pages():
    cache = make_cache(num_pages=8)
    running = compute(cache, [1] * 8)
    end(cache, compute(cache, [2] * 8, salt="a"))
    cache.clear()
    cache.check([running.pages])
    assert (cache.allocator.num_free, cache.allocator.num_cached, cache.allocator.num_used) == (6, 0, 2)
    cache.release(running.pages)
    assert cache.allocator.num_free == 8


def test_not_enabled_it_keeps_nothing():
    cache = make_cache(enabled=False)
    sequence = compute(cache, [1] * 8)
    assert find(cache, [1] * 8) == Prefix([], 0)
    cache.release(sequence.pages)
    assert cache.allocator.num_free == cache.allocator.num_pages


def test_the_list_of_pages_to_evict_does_not_grow_with_use():
    cache = make_cache()
    for _ in range(500):
        end(cache, compute(cache, [1] * 9))
    assert len(cache._oldest) < 100


def test_a_salt_of_lone_surrogates_is_a_salt():
    cache = make_cache()
    compute(cache, [1] * 4, salt="\ud800")
    assert find(cache, [1] * 4, salt="\ud800").num_tokens == 4


def test_check_sees_a_node_under_another_page():
    cache = make_cache()
    sequence = compute(cache, [1] * 4)
    node = cache._nodes[sequence.pages[0]]
    node.page = 7
    with pytest.raises(RuntimeError, match="page 7 is in the tree"):
        cache.check([sequence.pages])
