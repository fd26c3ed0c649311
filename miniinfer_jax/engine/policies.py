"""Who is served first: a scheduling policy is a sort key, and the smallest key goes first."""

from collections.abc import Callable
from typing import Any

from miniinfer_jax.sequence import Sequence

# Keys of two sequences differ, and a sequence keeps its key for life.
PolicyKey = Callable[[Sequence], Any]


def first_come_first_served(sequence: Sequence) -> int:
    """The order of arrival: sequence ids count up."""
    return sequence.sequence_id


POLICIES: dict[str, PolicyKey] = {"fcfs": first_come_first_served}
