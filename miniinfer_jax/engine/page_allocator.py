"""Which pages of the cache are free, and how often each of the others is referenced."""

from collections import Counter
from collections.abc import Iterable


class PageAllocator:
    """A pool of pages 0 to num_pages - 1, each free or referenced: free + used = total.

    Asking for more than is free, and freeing what is free already, are bugs of the caller: RuntimeError.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a page pool needs at least 1 page")
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(reversed(range(num_pages)))  # a stack: the page freed last is the next one used

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """`num_pages` free pages, from now on referenced once."""
        if num_pages > self.num_free:
            raise RuntimeError(f"{num_pages} pages asked for, {self.num_free} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._references[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Drops one reference to each of `pages`; a page without any is free."""
        for page in pages:
            if self._references[page] == 0:
                raise RuntimeError(f"page {page} is freed, and it is free already")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Raises RuntimeError unless every page is free or referenced as often as `owners` (lists of pages) hold it."""
        owned = Counter(page for pages in owners for page in pages)
        free = Counter(self._free)
        for page, references in enumerate(self._references):
            if owned[page] != references:
                raise RuntimeError(f"page {page} has {references} references and {owned[page]} owners")
            if free[page] != (references == 0):
                raise RuntimeError(
                    f"page {page} has {references} references and is {free[page]} times in the free list"
                )
        if len(owned) + len(free) != self.num_pages:
            raise RuntimeError(f"{len(free)} free + {len(owned)} used pages are not the {self.num_pages} of the pool")
