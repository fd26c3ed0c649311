"""How many tokens a step may carry: all that fit, or as many as keep the time between tokens to a target."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from statistics import median_low


class StepBudget:
    """Chooses a size of step, from what the last steps of each size took.

    A step is padded to one of a few sizes and costs what its size costs, so there is one estimate a size: the median,
    which a single slow step does not move. The largest size that keeps to the target is taken; but the one after it is
    tried if nothing is known of it, and what is known of a size that was too slow is forgotten after `RETRY_AFTER`
    steps, so that a device that got faster is used.

    sizes: tokens, ascending. target: seconds from a token of a sequence to its next; None: always the largest size.
    """

    NUM_KEPT = 5
    RETRY_AFTER = 256

    def __init__(self, sizes: Sequence[int], target: float | None = None) -> None:
        self._sizes = tuple(sizes)
        self._target = target
        self._seconds: list[deque[float]] = [deque(maxlen=self.NUM_KEPT) for _ in self._sizes]
        self._last_steps = [0] * len(self._sizes)  # when each size was seen last
        self._num_steps = 0

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
        self._num_steps += 1
        self._seconds[size].append(seconds)
        self._last_steps[size] = self._num_steps
        for larger in range(size + 1, len(self._sizes)):
            if self._num_steps - self._last_steps[larger] >= self.RETRY_AFTER:
                self._seconds[larger].clear()

    def _largest_in_time(self, target: float) -> int:
        """The index of the size to take."""
        in_time = [size for size, seconds in enumerate(self._seconds) if seconds and median_low(seconds) <= target]
        largest = in_time[-1] if in_time else -1
        is_next_unknown = largest + 1 < len(self._sizes) and not self._seconds[largest + 1]
        return largest + 1 if is_next_unknown else max(largest, 0)
