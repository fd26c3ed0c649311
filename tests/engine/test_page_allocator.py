"""Pages are handed out once, come back once, and the integrity check sees every way to break that."""

import pytest

from miniinfer_jax.engine.page_allocator import PageAllocator


def test_pages_are_distinct_and_come_back():
    allocator = PageAllocator(4)
    first = allocator.allocate(3)
    assert len(set(first)) == 3
    assert allocator.num_free == 1
    allocator.check([first])
    allocator.free(first)
    assert allocator.num_free == 4
    assert sorted(allocator.allocate(4)) == [0, 1, 2, 3]


def test_allocating_nothing_takes_nothing():
    allocator = PageAllocator(2)
    assert allocator.allocate(0) == []
    assert allocator.num_free == 2


def test_a_request_too_large_takes_nothing():
    allocator = PageAllocator(2)
    with pytest.raises(RuntimeError, match="3 pages asked for, 2 of 2 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2


def test_freeing_twice_is_an_error():
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.free(pages)
    with pytest.raises(RuntimeError, match="nobody references it"):
        allocator.free(pages)


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="num_pages is 0"):
        PageAllocator(0)


def test_check_sees_a_leaked_page():
    allocator = PageAllocator(3)
    [page] = allocator.allocate(1)
    with pytest.raises(RuntimeError, match=f"page {page} has 1 references and 0 owners"):
        allocator.check([])


def test_check_sees_a_page_owned_twice():
    allocator = PageAllocator(3)
    pages = allocator.allocate(1)
    with pytest.raises(RuntimeError, match="1 references and 2 owners"):
        allocator.check([pages, pages])


def test_check_sees_an_owner_of_a_free_page():
    with pytest.raises(RuntimeError, match="page 2 has 0 references and 1 owners"):
        PageAllocator(3).check([[2]])


def test_check_sees_a_page_outside_the_pool():
    with pytest.raises(RuntimeError, match="are not the 3 of the pool"):
        PageAllocator(3).check([[7]])


def test_a_shared_page_is_free_after_its_last_owner():
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.share(pages)
    assert allocator.num_references(pages[0]) == 2
    allocator.check([pages, pages])
    allocator.free(pages)
    assert allocator.num_free == 1
    allocator.free(pages)
    assert allocator.num_free == 2


def test_a_kept_page_is_cached_between_its_owners():
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    allocator.keep(pages[0])
    assert allocator.free(pages) == [pages[0]]
    assert (allocator.num_free, allocator.num_cached, allocator.num_used) == (2, 1, 0)
    allocator.check([], kept=[pages[0]])
    allocator.share(pages[:1])
    assert (allocator.num_cached, allocator.num_used) == (0, 1)
    allocator.free(pages[:1])
    allocator.drop(pages[0])
    assert allocator.num_free == 3


def test_pages_that_are_free_cannot_be_shared_kept_or_dropped():
    allocator = PageAllocator(1)
    for action in (lambda: allocator.share([0]), lambda: allocator.keep(0), lambda: allocator.drop(0)):
        with pytest.raises(RuntimeError, match="page 0"):
            action()


def test_check_sees_a_kept_page_that_nobody_keeps():
    allocator = PageAllocator(1)
    pages = allocator.allocate(1)
    allocator.keep(pages[0])
    with pytest.raises(RuntimeError, match="page 0 is kept: True, by 0"):
        allocator.check([pages])
