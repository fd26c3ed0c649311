"""Which tokens the pages of the pool hold, so that a request finds the beginning that others have computed."""

import hashlib
import heapq
import struct
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from miniinfer_jax.engine.host_pages import HostPages
from miniinfer_jax.engine.page_allocator import PageAllocator
from miniinfer_jax.sequence import HostCopy, Sequence


@dataclass(frozen=True)
class Prefix:
    """The first num_tokens tokens of a sequence, where they are in pages already.

    `pages` are shared as they are; if they hold less than num_tokens, the rest stands at the start of `part_page`,
    of which a copy is needed, or in host memory: a whole page at each of `host_places`.
    """

    pages: list[int]
    num_tokens: int
    part_page: int | None = None
    host_places: tuple[int, ...] = ()

    def without_part(self, page_size: int) -> "Prefix":
        return Prefix(self.pages, len(self.pages) * page_size)


class Node:
    """A full page of the tree: its tokens follow those of its ancestors. A root is the empty prefix of one salt."""

    __slots__ = (
        "children",
        "depth",
        "is_attached",
        "key",
        "last_used",
        "ordered",
        "page",
        "parent",
        "plan",
        "salt",
        "tokens",
    )

    def __init__(self, salt: str | None, parent: "Node | None", tokens: tuple[int, ...], page: int, key: bytes) -> None:
        self.salt = salt
        self.parent = parent
        self.tokens = tokens
        self.page = page
        self.key = key  # sha256 of the parent's key and the tokens: names this prefix outside of this process too
        self.depth: int = 0 if parent is None else parent.depth + 1  # pages from the root
        self.children: dict[tuple[int, ...], Node] = {}
        self.ordered: list[tuple[int, ...]] = []  # the keys of children: neighbours have the most in common
        self.plan = 0  # the number of the plan that fills the page
        self.last_used = 0
        self.is_attached = True


class PrefixCache:
    """A radix tree over page-sized runs of tokens, and the door to the page pool for everybody who shares pages.

    Nodes are found by comparing tokens, one salt apart from the other. A page stays in the tree when its last
    sequence ends, and is evicted when somebody needs a page: the leaf that nobody holds and that went unused for
    longest first, in O(log n). Not enabled, it keeps nothing; pages can still be shared.

    Pages enter when the step that fills them is planned. The device runs steps in order and, in each layer, writes
    before it attends: a whole page may be shared at once. The copy of a part is made in front of the step, and so
    taken only of pages that earlier plans fill.
    """

    def __init__(
        self, allocator: PageAllocator, page_size: int, *, enabled: bool, host_pages: HostPages | None = None
    ) -> None:
        self.allocator = allocator
        self.host_pages = HostPages(0) if host_pages is None else host_pages
        self._offloads: list[HostCopy] = []
        self.enabled = enabled
        self.num_evictions = 0
        self._page_size = page_size
        self._token_bytes = struct.Struct(f"<{page_size}q")
        self._roots: dict[str | None, Node] = {}
        self._nodes: dict[int, Node] = {}  # by page
        self._places: dict[Sequence, Node] = {}  # the deepest node of the path of each unfinished sequence
        self._plan = 0
        self._clock = 0
        self._serial = 0
        self._oldest: list[tuple[int, int, Node]] = []  # heap of (last used, -, node); those out of date are skipped

    def empty(self, allocator: PageAllocator) -> "PrefixCache":
        """One that holds nothing yet, over another pool; evictions go on being counted."""
        cache = PrefixCache(allocator, self._page_size, enabled=self.enabled, host_pages=self.host_pages)
        cache.num_evictions = self.num_evictions
        return cache

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free ones, and cached ones, which are evicted for it."""
        return self.allocator.num_free + self.allocator.num_cached

    def begin_plan(self) -> None:
        """From here on, pages that enter are filled by the next plan."""
        self._plan += 1
        self.host_pages.begin_plan()

    def take_offloads(self) -> list[HostCopy]:
        """The pages evicted since the last call that go to host memory; they must be read before they are written."""
        offloads, self._offloads = self._offloads, []
        self.host_pages.end_plan()
        return offloads

    def match(self, sequence: Sequence, max_len: int) -> Prefix:
        """The longest beginning of at most `max_len` tokens; remembers how far it got, and goes on from there."""
        found = self._match_tree(sequence, max_len)
        if len(self.host_pages) == 0:
            return found
        num_full, node = len(found.pages), self._place(sequence)
        key = _root_key(sequence.cache_salt) if node is None else node.key
        tokens = sequence.tokens_between(num_full * self._page_size, max_len)
        places: list[int] = []
        for start in range(0, len(tokens) - self._page_size + 1, self._page_size):
            key = self._child_key(key, tokens[start : start + self._page_size])
            if (place := self.host_pages.find(key)) is None:
                break
            places.append(place)
        if not places:
            return found
        return Prefix(found.pages, (num_full + len(places)) * self._page_size, host_places=tuple(places))

    def _match_tree(self, sequence: Sequence, max_len: int) -> Prefix:
        node = self._place(sequence)
        if node is None:
            return Prefix([], 0)
        while node.depth * self._page_size > max_len:
            assert node.parent is not None
            node = node.parent
        tokens = sequence.tokens_between(node.depth * self._page_size, max_len)
        start = 0
        while len(tokens) - start >= self._page_size:
            child = node.children.get(tuple(tokens[start : start + self._page_size]))
            if child is None:
                break
            node, start = child, start + self._page_size
        self._places[sequence] = node
        part_page, part_len = self._match_part(node, tuple(tokens[start : start + self._page_size]))
        return Prefix(_path(node), node.depth * self._page_size + part_len, part_page)

    def insert(self, sequence: Sequence) -> None:
        """Takes in the full pages of known tokens of a running sequence; where others were first, theirs stay."""
        num_full = min(sequence.num_known_tokens, sequence.num_computed) // self._page_size
        if not self.enabled or num_full == 0:
            return
        node = self._place(sequence) or self._make_root(sequence.cache_salt)
        if node.depth >= num_full:
            return
        first = node.depth
        tokens = sequence.tokens_between(first * self._page_size, num_full * self._page_size)
        for index, page in enumerate(sequence.pages[first:num_full]):
            run = tuple(tokens[index * self._page_size : (index + 1) * self._page_size])
            node = node.children.get(run) or self._attach(node, run, page)
        self._places[sequence] = node

    def forget(self, sequence: Sequence) -> None:
        """Takes out every page of a sequence, those that it found here too, with all that hangs below."""
        node = self._place(sequence)
        while node is not None and node.depth > 1:
            node = node.parent
        if node is not None and node.depth == 1:
            self._cut(node)
        self.leave(sequence)

    def join(self, sequence: Sequence, other: Sequence) -> None:
        """A waiting sequence stands where the other one does, all of whose tokens it has."""
        if (node := self._places.get(other)) is not None:
            self._places[sequence] = node

    def leave(self, sequence: Sequence) -> None:
        """Forgets where a sequence stood: it has ended."""
        self._places.pop(sequence, None)

    def clear(self) -> None:
        """Takes out everything; pages that sequences reference stay theirs."""
        for root in list(self._roots.values()):
            for node in list(root.children.values()):
                self._cut(node)

    def allocate(self, num_pages: int) -> list[int]:
        """Pages to write to, evicting as many as are missing."""
        self.make_free(num_pages)
        return self.allocator.allocate(num_pages)

    def make_free(self, num_pages: int) -> None:
        """Evicts ahead of time, until so many pages are free or none is cached."""
        while self.allocator.num_free < num_pages and self.allocator.num_cached:
            self._evict()

    def touch(self, pages: list[int]) -> None:
        """These pages count as used now: of the cached ones they are evicted last."""
        self.share(pages)
        self.release(pages)

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page, which nobody can evict until it is released."""
        self.allocator.share(pages)

    def release(self, pages: list[int]) -> None:
        """Drops one reference to each page: it is cached or free when it was the last."""
        self._clock += 1
        for page in self.allocator.free(reversed(pages)):  # a child before its parent: so they will be evicted
            self._list(self._nodes[page])

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` are cached, and could not be evicted any more once they are shared."""
        return sum(self.allocator.num_references(page) == 0 for page in pages)

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Raises RuntimeError unless the pages are owned as often as they are referenced, and the tree is sound."""
        self.allocator.check(owners, self._nodes)
        todo, num_nodes = list(self._roots.values()), 0
        while todo:
            node = todo.pop()
            todo += node.children.values()
            num_nodes += node.parent is not None
            if node.parent is not None and self._nodes.get(node.page) is not node:
                raise RuntimeError(f"page {node.page} is in the tree, and not under its number")
            if not node.is_attached or sorted(node.children) != node.ordered:
                raise RuntimeError(f"the node of page {node.page} and its children do not know each other")
        if num_nodes != len(self._nodes):
            raise RuntimeError(f"{num_nodes} pages are in the tree, {len(self._nodes)} are counted")
        listed = {node for stamp, _, node in self._oldest if self._is_evictable(node, stamp)}
        if len(listed) != self.allocator.num_cached:
            raise RuntimeError(f"{len(listed)} pages are listed for eviction, {self.allocator.num_cached} are cached")

    def _place(self, sequence: Sequence) -> Node | None:
        """Where a sequence stands in the tree, as deep as known; None while there is nothing under its salt."""
        node = self._places.get(sequence)
        while node is not None and not node.is_attached:
            node = node.parent
        return node or self._roots.get(sequence.cache_salt)

    def _make_root(self, salt: str | None) -> Node:
        return self._roots.setdefault(salt, Node(salt, None, (), -1, _root_key(salt)))

    def _child_key(self, key: bytes, tokens: Iterable[int]) -> bytes:
        return hashlib.sha256(key + self._token_bytes.pack(*tokens)).digest()

    def _match_part(self, node: Node, tokens: tuple[int, ...]) -> tuple[int | None, int]:
        """(a page that begins with some of tokens, how many): of all children a neighbour has the most in common."""
        place = bisect_left(node.ordered, tokens)
        part_page, part_len = None, 0
        for run in node.ordered[max(0, place - 1) : place + 1]:
            child = node.children[run]
            common = _common_len(run, tokens) if child.plan < self._plan else 0
            if common > part_len:
                part_page, part_len = child.page, common
        return part_page, part_len

    def _attach(self, parent: Node, tokens: tuple[int, ...], page: int) -> Node:
        key = self._child_key(parent.key, tokens)
        node = Node(parent.salt, parent, tokens, page, key)
        node.plan = self._plan
        self.allocator.keep(page)
        self._nodes[page] = parent.children[tokens] = node
        insort(parent.ordered, tokens)
        return node

    def _cut(self, top: Node) -> None:
        """Takes out a node and all that hangs below it, and a root that is left without children."""
        parent = top.parent
        assert parent is not None
        del parent.children[top.tokens]
        del parent.ordered[bisect_left(parent.ordered, top.tokens)]
        if parent.parent is None and not parent.children:
            parent.is_attached = False
            del self._roots[parent.salt]
        todo = [top]
        while todo:
            node = todo.pop()
            todo += node.children.values()
            node.is_attached = False
            del self._nodes[node.page]
            self.allocator.drop(node.page)

    def _evict(self) -> None:
        """Takes out the leaf that nobody holds and that went unused for longest.

        Who holds a page holds its ancestors too, and they are used later than it. Not so who computed a page that
        others had put in before: their page can be the oldest, with a child that is in use. It goes when nothing else
        is left, and the child loses its place.
        """
        while True:
            last_used, _, node = heapq.heappop(self._oldest)
            if not self._is_evictable(node, last_used):
                continue
            if not node.children or last_used == self._clock:
                break
            self._list(node)
        self._cut(node)
        self.num_evictions += 1
        if (place := self.host_pages.store(node.key)) is not None:
            self._offloads.append(HostCopy(node.page, place))

    def _is_evictable(self, node: Node, last_used: int) -> bool:
        return node.is_attached and node.last_used == last_used and self.allocator.num_references(node.page) == 0

    def _list(self, node: Node) -> None:
        """Puts a node that nobody holds on the list of those to evict, as used now."""
        self._serial += 1
        node.last_used = self._clock
        heapq.heappush(self._oldest, (self._clock, self._serial, node))
        if len(self._oldest) > 2 * len(self._nodes) + 64:
            self._oldest = [entry for entry in self._oldest if self._is_evictable(entry[2], entry[0])]
            heapq.heapify(self._oldest)


def _root_key(salt: str | None) -> bytes:
    return hashlib.sha256(b"" if salt is None else salt.encode("utf-8", "surrogatepass")).digest()


def _path(node: Node) -> list[int]:
    """The pages from the root down to a node."""
    pages = []
    while node.parent is not None:
        pages.append(node.page)
        node = node.parent
    pages.reverse()
    return pages


def _common_len(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    for length, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return length
    return min(len(first), len(second))
