"""How many tokens a step may carry: all that fit, or as many as keep the time between tokens to a target."""

from bisect import bisect_left
from collections.abc import Sequence


class StepBudget:
    """Chooses a size of step, from what steps of each size took of late.

    A step is padded to one of a few sizes and costs what its size costs, so there is one estimate a size, a moving
    average. The largest size that keeps to the target is taken, and then the next one is tried once if it was never
    seen. The estimates of larger sizes than those seen sink slowly, so that they are tried again later: one that took
    twice the target, after some hundred steps.

    sizes: tokens, ascending. target: seconds from a token of a sequence to its next; None: always the largest size.
    """

    NEWEST_SHARE = 0.2  # of the newest step in the average
    SINKING = 1 / 256  # of the way to what was seen, a step

    def __init__(self, sizes: Sequence[int], target: float | None = None) -> None:
        self._sizes = tuple(sizes)
        self._target = target
        self._seconds: list[float | None] = [None] * len(self._sizes)

    def num_tokens(self, num_decoding: int) -> int:
        """Tokens for the next step, the ones of `num_decoding` sequences among them.

        There is always room for a prompt to go on, even if the target is missed by that. Nobody waits for a token
        while nothing decodes: the step may be as long as it likes.
        """
        if self._target is None or num_decoding == 0:
            return self._sizes[-1]
        needed = min(bisect_left(self._sizes, num_decoding + 1), len(self._sizes) - 1)
        return self._sizes[max(self._largest_in_time(self._target), needed)]

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step with prompts in it, of num_tokens tokens in all, took so long."""
        size = min(bisect_left(self._sizes, num_tokens), len(self._sizes) - 1)
        before = self._seconds[size]
        average = seconds if before is None else before + self.NEWEST_SHARE * (seconds - before)
        self._seconds[size] = average
        for larger in range(size + 1, len(self._sizes)):
            estimate = self._seconds[larger]
            if estimate is not None:
                self._seconds[larger] = estimate + self.SINKING * (average - estimate)

    def _largest_in_time(self, target: float) -> int:
        """The index of the size to take."""
        in_time = [size for size, seconds in enumerate(self._seconds) if seconds is not None and seconds <= target]
        largest = in_time[-1] if in_time else -1
        untried = largest + 1 < len(self._sizes) and self._seconds[largest + 1] is None
        return largest + 1 if untried else max(largest, 0)
