"""Which pages of the pool are free, which are cached, and how often each of the others is referenced."""

from collections import Counter
from collections.abc import Iterable


class PageAllocator:
    """A pool of pages 0 to num_pages - 1: free + cached + used = total.

    A page is used while anybody references it, any number of times. Without references it is cached if it is kept
    (the prefix cache can find its content again), else free. Asking for more than is free, and freeing what nobody
    references, are bugs of the caller: RuntimeError.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a page pool needs at least 1 page")
        self.num_pages = num_pages
        self.num_cached = 0
        self._references = [0] * num_pages
        self._is_kept = [False] * num_pages
        self._free = list(reversed(range(num_pages)))  # a stack: the page freed last is the next one used

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free - self.num_cached

    def occupied(self) -> list[int]:
        """The pages that hold something: all but the free ones."""
        return [page for page in range(self.num_pages) if self._references[page] or self._is_kept[page]]

    def num_references(self, page: int) -> int:
        return self._references[page]

    def is_kept(self, page: int) -> bool:
        return self._is_kept[page]

    def allocate(self, num_pages: int) -> list[int]:
        """`num_pages` free pages, from now on referenced once."""
        if num_pages > self.num_free:
            raise RuntimeError(f"{num_pages} pages asked for, {self.num_free} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each of `pages`, which are used or cached."""
        for page in pages:
            if self._references[page] == 0:
                if not self._is_kept[page]:
                    raise RuntimeError(f"page {page} is shared, and it is free")
                self.num_cached -= 1
            self._references[page] += 1

    def free(self, pages: Iterable[int]) -> list[int]:
        """Drops one reference to each of `pages`; gives those that are only cached now. Without references and not
        kept, a page is free."""
        left = []
        for page in pages:
            if self._references[page] == 0:
                raise RuntimeError(f"page {page} is freed, and nobody references it")
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._is_kept[page]:
                    self.num_cached += 1
                    left.append(page)
                else:
                    self._free.append(page)
        return left

    def keep(self, page: int) -> None:
        """The used page `page` will be cached, not free, when its last reference goes."""
        if self._references[page] == 0 or self._is_kept[page]:
            raise RuntimeError(f"page {page} is to be kept, and it is not used or kept already")
        self._is_kept[page] = True

    def drop(self, page: int) -> None:
        """Undoes `keep`; a cached page is free at once."""
        if not self._is_kept[page]:
            raise RuntimeError(f"page {page} is dropped, and it is not kept")
        self._is_kept[page] = False
        if self._references[page] == 0:
            self.num_cached -= 1
            self._free.append(page)

    def check(self, owners: Iterable[Iterable[int]], kept: Iterable[int] = ()) -> None:
        """Raises RuntimeError unless every page is referenced as often as `owners` (lists of pages) hold it, is kept if
        it is one of `kept`, and is free if neither."""
        owned = Counter(page for pages in owners for page in pages)
        free, keeping = Counter(self._free), Counter(iter(kept))  # of a dict, its keys
        num_cached = 0
        for page, references in enumerate(self._references):
            if owned[page] != references:
                raise RuntimeError(f"page {page} has {references} references and {owned[page]} owners")
            if keeping[page] != self._is_kept[page]:
                raise RuntimeError(f"page {page} is kept: {self._is_kept[page]}, by {keeping[page]} nodes")
            if free[page] != (references == 0 and not self._is_kept[page]):
                raise RuntimeError(
                    f"page {page} has {references} references and is {free[page]} times in the free list"
                )
            num_cached += references == 0 and self._is_kept[page]
        num_used = sum(references > 0 for references in self._references)
        is_whole = num_cached == self.num_cached and len(free) + num_cached + num_used == self.num_pages
        if not is_whole or any(not 0 <= page < self.num_pages for page in (*owned, *free, *keeping)):
            raise RuntimeError(
                f"{len(free)} free + {self.num_cached} cached + {num_used} used pages are not the {self.num_pages} "
                "of the pool"
            )
