"""The sequences that wait, first by policy first, each step of it in O(log n)."""

import heapq
from collections.abc import Iterator
from typing import Any

from miniinfer_jax.engine.policies import Policy
from miniinfer_jax.sequence import Sequence


class WaitingQueue:
    """A heap of sequences for every group of the policy, and a heap of the groups.

    While a group waits its key may only grow, so an entry that is out of date stands too near to the front, never too
    far behind: it is put right when it comes up. Sequences that end while they wait leave when they come up. Only where
    the policy says that the keys of all have changed, all are put in order anew, in O(n).
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._groups: dict[str, list[tuple[Any, Sequence]]] = {}
        self._order: list[tuple[float, int, str]] = []  # (key, number, group), one entry for each of _groups
        self._num_joined = 0  # numbers the groups: of two with the same key, the one that waits longer is first
        self._last_started: str | None = None
        self._num_reorders = policy.num_reorders

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in no order."""
        for heap in self._groups.values():
            yield from (sequence for _, sequence in heap if not sequence.is_finished)

    def push(self, sequence: Sequence) -> None:
        """Queues a sequence; its key is taken now."""
        group = self._policy.group(sequence)
        if not self._live(group):
            first = self.first()
            self._policy.on_group_joined(group, self._policy.group(first) if first else self._last_started)
        if group not in self._groups:
            self._groups[group] = []
            heapq.heappush(self._order, (self._policy.group_key(group), self._num_joined, group))
            self._num_joined += 1
        heapq.heappush(self._groups[group], (self._policy.key(sequence), sequence))

    def first(self) -> Sequence | None:
        """The sequence that is to start next."""
        if self._num_reorders != self._policy.num_reorders:
            self._reorder()
        while self._order:
            key, number, group = self._order[0]
            heap = self._live(group)
            if not heap:
                heapq.heappop(self._order)
                del self._groups[group]
            elif (now := self._policy.group_key(group)) > key:
                heapq.heapreplace(self._order, (now, number, group))
            else:
                return heap[0][1]
        return None

    def pop(self) -> Sequence:
        """Takes the first one out, which must be there."""
        sequence = self.first()
        assert sequence is not None
        self._last_started = self._policy.group(sequence)
        heapq.heappop(self._groups[self._last_started])
        return sequence

    def _reorder(self) -> None:
        self._num_reorders = self._policy.num_reorders
        for group, heap in self._groups.items():
            live = (sequence for _, sequence in heap if not sequence.is_finished)
            self._groups[group] = [(self._policy.key(sequence), sequence) for sequence in live]
            heapq.heapify(self._groups[group])

    def _live(self, group: str) -> list[tuple[Any, Sequence]]:
        """The heap of a group, its first sequence one that still waits; empty if none does."""
        heap = self._groups.get(group, [])
        while heap and heap[0][1].is_finished:
            heapq.heappop(heap)
        return heap
