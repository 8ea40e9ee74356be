"""How far a healing is, by steps or by the time that it has trained, over all its runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ..devices.processes import Processes

WARM_UP = 0.05
"""Share of a stage in which the learning rates rise; they fall as a cosine afterwards."""
LAST_RATE = 0.05
"""Share of the full rate at both ends of a stage."""
LOOKS = 12
"""Evenly spread over a healing: so often it is evaluated, and a state is saved from which a stopped one goes on."""


class Clock:
    """Counts steps, or seconds from when it was made.

    Args:
        steps: of the whole healing; or
        seconds: that it may take.
        advance: called with the number of steps or seconds that have passed since the last call.
        processes: go by the clock of the first.
    """

    def __init__(
        self, steps: int | None, seconds: float | None, advance: Callable[[int], None], processes: Processes
    ) -> None:
        self.total = float(steps or seconds or 0)
        self._counts_steps, self._advance, self._processes = steps is not None, advance, processes
        self._started, self._earlier, self._shown = time.monotonic(), 0.0, 0

    def resume(self, seconds: float) -> None:
        """Goes on behind so many seconds that an earlier run took."""
        self._earlier, self._started = seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        """That all runs have taken so far."""
        return self._earlier + time.monotonic() - self._started

    def passed(self, step: int) -> float:
        """Steps or seconds so far, at most all; ``step`` is the number of those that were done."""
        passed = float(step) if self._counts_steps else self._processes.from_first(lambda: self.seconds)
        passed = min(passed, self.total)
        if int(passed) > self._shown:
            self._advance(int(passed) - self._shown)
            self._shown = int(passed)
        return passed

    def look(self, passed: float) -> int:
        """Which of the looks is the last that is due."""
        return math.floor(LOOKS * passed / self.total)


def rate(share: float) -> float:
    """What learning rates are multiplied by, where ``share`` of a stage has passed."""
    if share < WARM_UP:
        return max(share / WARM_UP, LAST_RATE)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2
