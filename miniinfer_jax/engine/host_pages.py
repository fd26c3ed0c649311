"""Which evicted pages are kept in host memory, to come back instead of being computed anew. Plain Python."""

from collections import OrderedDict


class HostPages:
    """Places for `num_pages` pages in host memory; the page that went unused for longest makes room for a new one.

    A page is found by the key of the prefix that it ends (sha256 chained over its tokens and all before them): what
    it holds never goes out of date, as long as the weights stay.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_loads = 0
        self._places: OrderedDict[bytes, int] = OrderedDict()  # by key, the least recently used first
        self._free = list(reversed(range(num_pages)))
        self._fresh: set[bytes] = set()  # stored, and filled by a plan that has not run
        self._in_plan: set[bytes] = set()  # those of them that the plan under way fills

    def __len__(self) -> int:
        return len(self._places)

    def begin_plan(self) -> None:
        """What the last plan was told to store has its content, once that plan has run."""
        self._fresh -= self._in_plan
        self._in_plan.clear()

    def end_plan(self) -> None:
        """All that was stored so far is filled by the plan under way, or has been."""
        self._in_plan |= self._fresh

    def find(self, key: bytes) -> int | None:
        """The place of a page that an earlier plan stored."""
        if key not in self._places or key in self._fresh:
            return None
        self._places.move_to_end(key)
        return self._places[key]

    def store(self, key: bytes) -> int | None:
        """A place for the page, which the plan under way or the next one fills; None if it is here, or none is kept."""
        if key in self._places or self.num_pages == 0:
            return None
        place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        self._places[key] = place
        self._fresh.add(key)
        return place

    def drop_fresh(self) -> None:
        """Forgets what the plan under way was to store: it did not run."""
        for key in self._fresh:
            if (place := self._places.pop(key, None)) is not None:
                self._free.append(place)
        self._fresh.clear()
        self._in_plan.clear()

    def clear(self) -> None:
        """Forgets everything, as after a change of the weights."""
        self._places.clear()
        self._fresh.clear()
        self._in_plan.clear()
        self._free = list(reversed(range(self.num_pages)))
