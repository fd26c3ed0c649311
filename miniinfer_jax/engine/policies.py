"""Who is served first: a policy is a sort key, the smallest first, and what makes the key change.

Of a running sequence the key is read whenever it is needed; of a waiting one when it joins the queue, and kept. No
policy reads a clock: time is counted in tokens that the engine computes, so that a run can be repeated decision by
decision. Service is counted once a token: what a preemption has computed anew costs its owner nothing.
"""

import inspect
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from miniinfer_jax.sequence import Sequence

PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2  # as in the VTC paper


class Policy:
    """First come, first served, and all that other policies change of it."""

    preempts: ClassVar[bool] = False  # whether anything is ever outranked
    num_reorders: int = 0  # counted up when the keys of waiting sequences have changed all at once

    def key(self, sequence: Sequence) -> Any:
        """Where a sequence stands in its group. Keys of two sequences differ."""
        return sequence.sequence_id  # ids count up

    def group(self, sequence: Sequence) -> str:
        """The group that a sequence waits in; a policy may move a whole group while its sequences wait."""
        return ""

    def group_key(self, group: str) -> float:
        """Where a group stands; it may only grow while sequences of the group wait."""
        return 0.0

    def order(self, sequence: Sequence) -> Any:
        """Where a sequence stands now among all."""
        return self.key(sequence)

    def outranked(self, waiting: Sequence, running: Iterable[Sequence]) -> list[Sequence]:
        """Those of `running` that have to give their slots or their pages to a waiting sequence."""
        return []

    def on_group_joined(self, group: str, ahead: str | None) -> None:
        """A group begins to wait. ahead: the group that is first by now, or if nobody waits, was the last to start."""

    def on_prompt(self, sequence: Sequence) -> None:
        """The step that is being planned computes a sequence that does not decode yet up to its num_computed."""

    def on_decoding(self, sequences: list[Sequence]) -> None:
        """The step that is being planned computes one more token of each of these."""


class ShortestJobFirst(Policy):
    """The sequence with the fewest tokens left to compute, by the estimate of its user or else by max_tokens.

    It ages: the work of a sequence counts `ageing` tokens less for every token that the engine computes while it
    waits. Two sequences age alike, so that their order is that of `work + ageing * arrival`, which stands still. What
    arrives when the engine has computed work / ageing tokens more can't overtake: nothing starves.
    """

    def __init__(self, ageing: float = 0.01) -> None:
        self.ageing = _positive("ageing", ageing)

    def key(self, sequence: Sequence) -> tuple[float, int]:
        return self.ageing * sequence.arrival + self._work(sequence), sequence.sequence_id

    @staticmethod
    def _work(sequence: Sequence) -> int:
        expected_len = sequence.max_len
        if sequence.expected_output_len is not None:
            # Once it has outlived the estimate, it is expected to end with the next token.
            outlived = sequence.num_tokens + 1
            expected_len = min(expected_len, max(sequence.prompt_len + sequence.expected_output_len, outlived))
        return expected_len - sequence.num_computed


class Priority(Policy):
    """The smallest `priority` first, equal ones in order of arrival; larger ones give way when slots or pages lack."""

    preempts = True

    def key(self, sequence: Sequence) -> tuple[int, int]:
        return sequence.priority, sequence.sequence_id

    def outranked(self, waiting: Sequence, running: Iterable[Sequence]) -> list[Sequence]:
        return [sequence for sequence in running if waiting.priority < sequence.priority]


class Fair(Policy):
    """The tenant that was served least, by the virtual token counter of Sheng et al.

    ("Fairness in Serving Large Language Models", OSDI 2024.) A counter a tenant adds up what its tokens cost, over the
    tenant's weight. A tenant that comes back is lifted to the one ahead, so that nobody saves up service. With L tokens
    in the longest prompt and M in all sequences that run at a time, the services of two tenants that both have
    sequences waiting differ by 2 * max(PROMPT_TOKEN_COST * L, OUTPUT_TOKEN_COST * M) at most, however long they wait.

    weights: by tenant, 1 for those not named; a tenant of weight 2 gets twice the service.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        if not isinstance(weights, Mapping | None):
            raise ValueError(f"weights is {weights!r}; give a weight by tenant, for example {{'alice': 2}}")
        for tenant in weights or {}:
            if not isinstance(tenant, str):
                raise ValueError(f"weights names the tenant {tenant!r}; a tenant is a string")
        self.weights = {
            tenant: _positive(f"the weight of tenant {tenant!r}", weight) for tenant, weight in (weights or {}).items()
        }
        self.counters: defaultdict[str, float] = defaultdict(float)
        self._most_counters = 1024

    def group(self, sequence: Sequence) -> str:
        return sequence.tenant

    def group_key(self, group: str) -> float:
        return self.counters[group]

    def order(self, sequence: Sequence) -> tuple[float, int]:
        return self.counters[sequence.tenant], sequence.sequence_id

    def on_group_joined(self, group: str, ahead: str | None) -> None:
        if ahead is not None:
            least = self.counters[ahead]
            self.counters[group] = max(self.counters[group], least)
            if len(self.counters) > self._most_counters:
                # Whoever has less does not wait, and would be lifted: to forget it changes nothing.
                kept = {tenant: counter for tenant, counter in self.counters.items() if counter >= least}
                self.counters = defaultdict(float, kept)
                self._most_counters = max(1024, 2 * len(kept))

    def on_prompt(self, sequence: Sequence) -> None:
        self.counters[sequence.tenant] += _charge(sequence) / self.weights.get(sequence.tenant, 1.0)

    def on_decoding(self, sequences: list[Sequence]) -> None:
        for tenant, num_tokens in Counter([sequence.tenant for sequence in sequences]).items():
            self.counters[tenant] += OUTPUT_TOKEN_COST * num_tokens / self.weights.get(tenant, 1.0)


class MultiQueue(Policy):
    """Multi-level feedback: new sequences first, and each goes down a level whenever it has used up its quantum.

    Quanta of service double from level to level, `quantum` at level 0. A lower level gives way to a higher one when
    slots or pages lack, once its prompt is computed. Within a level the order is that of arrival. After every
    `boost_interval` of service all sequences are back at level 0, so the oldest comes first: nothing starves.
    """

    preempts = True

    def __init__(self, quantum: int = 512, num_levels: int = 6, boost_interval: int = 1_000_000) -> None:
        self.quantum = _positive("quantum", quantum, int)
        self.num_levels = _positive("num_levels", num_levels, int)
        self.boost_interval = _positive("boost_interval", boost_interval, int)
        self._served: defaultdict[int, int] = defaultdict(int)  # by sequence id, since the last boost
        self._total_served = 0

    def level(self, sequence: Sequence) -> int:
        # Quanta q, 2q, 4q, ... are used up after q, 3q, 7q, ...
        num_quanta = self._served.get(sequence.sequence_id, 0) // self.quantum + 1
        return min(num_quanta.bit_length(), self.num_levels) - 1

    def key(self, sequence: Sequence) -> tuple[int, int]:
        return self.level(sequence), sequence.sequence_id

    def outranked(self, waiting: Sequence, running: Iterable[Sequence]) -> list[Sequence]:
        level = self.level(waiting)
        if level == self.num_levels - 1:
            return []
        served, used_up = self._served, self.quantum * (2 ** (level + 1) - 1)
        return [
            sequence
            for sequence in running
            if served.get(sequence.sequence_id, 0) >= used_up and sequence.num_computed >= sequence.prefill_len
        ]

    def on_prompt(self, sequence: Sequence) -> None:
        cost = _charge(sequence)
        self._served[sequence.sequence_id] += cost
        self._count(cost)

    def on_decoding(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._served[sequence.sequence_id] += OUTPUT_TOKEN_COST
        self._count(OUTPUT_TOKEN_COST * len(sequences))

    def _count(self, cost: int) -> None:
        self._total_served += cost
        if self._total_served >= self.boost_interval:
            self.num_reorders += 1
            self._served.clear()
            self._total_served = 0


POLICIES: dict[str, type[Policy]] = {
    "fcfs": Policy,
    "sjf": ShortestJobFirst,
    "priority": Priority,
    "fair": Fair,
    "multi_queue": MultiQueue,
}


def make_policy(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """A policy of its own for one scheduler. Raises ValueError for a name, an option or a value that it can't have."""
    if name not in POLICIES:
        raise ValueError(f"scheduling policy {name!r} is not known; known: {', '.join(POLICIES)}")
    known = list(inspect.signature(POLICIES[name]).parameters)
    for option in options or {}:
        if option not in known:
            raise ValueError(
                f"scheduling policy {name!r} has no option {option!r}; it has {', '.join(known) or 'no options'}"
            )
    return POLICIES[name](**(options or {}))


def _charge(sequence: Sequence) -> int:
    """What those tokens of a prefill cost that are computed for the first time; from now on they are paid for."""
    start, end = sequence.num_charged, sequence.num_computed
    if end <= start:
        return 0
    sequence.num_charged = end
    num_prompt = max(0, min(sequence.prompt_len, end) - start)
    return PROMPT_TOKEN_COST * num_prompt + OUTPUT_TOKEN_COST * (end - start - num_prompt)


def _positive(name: str, value: Any, kind: Any = int | float) -> Any:
    is_kind = isinstance(value, kind) and not isinstance(value, bool)
    if not is_kind or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} is {value!r}; it must be a positive {'integer' if kind is int else 'number'}")
    return value
