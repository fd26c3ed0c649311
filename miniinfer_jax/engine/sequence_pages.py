"""The pages of sequences: what each holds and will want, and what it finds computed already. Plain integers only."""

from collections.abc import Collection

from miniinfer_jax.engine.host_pages import HostPages
from miniinfer_jax.engine.inheritance import inherited_prefix
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.engine.prefix_cache import Prefix, PrefixCache
from miniinfer_jax.sequence import HostCopy, NewPage, PageCopy, Sequence, StepPlan


class SequencePages:
    """One page pool, and how running sequences come to its pages.

    What a running sequence holds of the pool (one slot, one row of the page table):

        [ free | cached | shared by several | sequence in slot 0 | ... ]     num_pages_for(num_computed) pages each

    A page is shared as long as it is full, or nobody writes to it: who writes to a shared page gets a copy. Cached
    pages are as good as free ones.
    """

    def __init__(
        self, allocator: PageAllocator, page_size: int, *, enable_prefix_caching: bool, num_host_pages: int = 0
    ) -> None:
        self.allocator = allocator
        host_pages = HostPages(num_host_pages)
        self.prefix_cache = PrefixCache(allocator, page_size, enabled=enable_prefix_caching, host_pages=host_pages)
        self.page_size = page_size
        self._filling: list[Sequence] = []  # whose pages the last plan fills, and are not in the prefix cache yet

    def start_over(self, num_pages: int) -> None:
        """A pool of another size, all of it free."""
        self._filling.clear()
        self.allocator = PageAllocator(num_pages)
        self.prefix_cache = self.prefix_cache.empty(self.allocator)

    def extend(self, sequence: Sequence, length: int, plan: StepPlan) -> None:
        """Gives a sequence what the next `length` tokens need: new pages, and a page of its own to go on in."""
        assert sequence.slot is not None
        if length and sequence.may_share_part:
            if self._must_copy(sequence, plan):
                column = sequence.num_computed // self.page_size
                sequence.pages[column] = self._copy(sequence.pages[column], plan)
                plan.new_pages.append(NewPage(sequence.slot, column, sequence.pages[column]))
            sequence.may_share_part = False
        for page in self.prefix_cache.allocate(self._num_new(sequence, length)):
            plan.new_pages.append(NewPage(sequence.slot, len(sequence.pages), page))
            sequence.pages.append(page)

    def note_computed(self, sequence: Sequence, length: int) -> None:
        """The plan has computed `length` more tokens of a sequence, maybe to the end of a page."""
        if length > 1 or sequence.num_computed % self.page_size == 0:
            self._filling.append(sequence)

    def take_prefix(self, sequence: Sequence, prefix: Prefix, plan: StepPlan) -> None:
        """Gives a sequence that starts the pages of its prefix."""
        assert sequence.slot is not None
        self.prefix_cache.share(prefix.pages)
        sequence.pages = list(prefix.pages)
        for place in prefix.host_places:
            [page] = self.prefix_cache.allocate(1)
            plan.loads.append(HostCopy(page, place))
            sequence.pages.append(page)
        self.prefix_cache.host_pages.num_loads += len(prefix.host_places)
        if prefix.part_page is not None:
            self.prefix_cache.share([prefix.part_page])
            sequence.pages.append(self._copy(prefix.part_page, plan))
        plan.shared_pages += [NewPage(sequence.slot, column, page) for column, page in enumerate(sequence.pages)]

    def give_back(self, sequence: Sequence, *, caches: bool) -> None:
        """Takes a sequence's pages back; what they hold can be found again, if it is worth anything."""
        if caches:
            self.prefix_cache.insert(sequence)
        self.prefix_cache.release(sequence.pages)
        sequence.pages = []
        sequence.may_share_part = False

    def forget_filling(self) -> None:
        """The last plan does not reach the device: what it would have filled stays out of the prefix cache."""
        self._filling.clear()

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def num_wanted(self, sequence: Sequence, length: int, plan: StepPlan) -> int:
        """Pages that the next `length` tokens of a sequence take out of the pool."""
        return self._num_new(sequence, length) + self._must_copy(sequence, plan)

    def _num_new(self, sequence: Sequence, length: int) -> int:
        """Pages to add so that the next `length` tokens of a sequence have a place."""
        return self.num_pages_for(sequence.num_computed + length) - len(sequence.pages)

    def _must_copy(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Whether the page that a sequence writes to next holds tokens that others, or the cache, count on too."""
        if not sequence.may_share_part or sequence.num_computed % self.page_size == 0:
            return False
        page = sequence.pages[sequence.num_computed // self.page_size]
        num_owners = self.allocator.num_references(page) + self.allocator.is_kept(page)
        return num_owners > 1 and num_owners - sum(copy.source == page for copy in plan.copies) > 1

    def _copy(self, source: int, plan: StepPlan) -> int:
        """A new page, filled from `source` before the step; the caller's reference to the source goes to the plan."""
        [target] = self.prefix_cache.allocate(1)
        plan.copies.append(PageCopy(source, target))
        return target

    def cache_filled(self) -> None:
        """The pages that plans since the last call fill enter the prefix cache."""
        for sequence in self._filling:
            self.prefix_cache.insert(sequence)
        self._filling.clear()

    def num_unclaimed(self, newcomer: Sequence, running: Collection[Sequence], plan: StepPlan) -> int:
        """Pages that no running sequence will soon want, or some of them where that is plenty for `newcomer`."""
        num_available = self.prefix_cache.num_available
        # A sequence that decodes claims the next two pages and a copy at most.
        prompts = [sequence for sequence in running if sequence.num_computed < sequence.prefill_len]
        num_left = num_available - 3 * len(running) - sum(self.claim(sequence, plan) for sequence in prompts)
        if num_left > self.num_pages_for(newcomer.num_tokens + self.page_size):
            return num_left
        return num_available - sum(self.claim(sequence, plan) for sequence in running)

    def find_prefix(
        self, sequence: Sequence, plan: StepPlan, draws_with_parent: bool, unclaimed: int
    ) -> tuple[Prefix, int]:
        """What is computed of a waiting sequence's tokens, and the pages of its start and its claim that are not.

        Pages that nobody runs with cost as much as new ones: sharing them, or holding one for a copy, keeps them from
        being evicted.
        """
        num_pages = self.num_pages_for(min(sequence.num_tokens + self.page_size, sequence.max_len - 1))
        if draws_with_parent:
            assert sequence.parent is not None
            self.prefix_cache.join(sequence, sequence.parent)
            sequence.may_share_part = sequence.parent.may_share_part = True
            prefix = Prefix(list(sequence.parent.pages), sequence.num_known_tokens)
            is_part_filled = prefix.num_tokens % self.page_size > 0
            return prefix, num_pages - len(prefix.pages) + is_part_filled
        found = self.prefix_cache.match(sequence, sequence.max_shared_len)
        inherited = inherited_prefix(sequence, plan, self.page_size)
        prefix = inherited if inherited.num_tokens > found.num_tokens else found
        claim = num_pages - len(prefix.pages) + self.prefix_cache.num_idle(prefix.pages)
        if prefix.part_page is not None:
            num_held = self.prefix_cache.num_idle([prefix.part_page])
            if claim + num_held <= unclaimed:
                return prefix, claim + num_held
            prefix = prefix.without_part(self.page_size)
        return prefix, claim

    def claim(self, sequence: Sequence, plan: StepPlan) -> int:
        """Pages that a sequence will soon want on top of its own: for all tokens so far and one page to grow.

        Admission leaves these free. If it looked at the first chunk alone, a newcomer would be preempted, being the
        last, as soon as its prompt or its neighbours grew, and its prefill would be thrown away.
        """
        num_tokens = min(sequence.num_tokens + self.page_size, sequence.max_len - 1)
        return self.num_pages_for(num_tokens) - len(sequence.pages) + self._must_copy(sequence, plan)
