"""Warn when steps take many times as long as before, because other processes use the cores.

Two threads beside a busy core are 10 to 100 times slower, since each product of matrices waits for the slower thread.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Hashable
from statistics import median, median_low

from .report import StepRecord


logger = logging.getLogger(f"transformers.{__name__}")

_MANY = 5.0  # Factor over the best time of a forward that calls for a warning; a doubled context takes 2.
_STEPS = 8  # Steps whose median hides an interruption.
_ENOUGH = 5  # Forwards of one size whose median is a sustained time.


class Pace:
    """Keeps the best times of a model's forwards; a process that is busy from the first step on goes unnoticed."""

    def __init__(self) -> None:
        self._best: dict[Hashable, float] = {}  # settings, sizes and context -> seconds
        self._newest: defaultdict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=_ENOUGH))
        self._has_warned = False

    def of_call(self, settings: Hashable, threads: int) -> "CallPace":
        """Start a call with `threads` of the CPU; its times depend on `settings` beside sizes."""
        return CallPace(self, settings, threads)

    def times_best(self, key: Hashable, seconds: float) -> float | None:
        """Return a forward's time over its best time, or `None` while that is being learned."""
        best, newest = self._best.get(key), self._newest[key]
        newest.append(seconds)
        if len(newest) == _ENOUGH:
            self._best[key] = median(newest) if best is None else min(median(newest), best)
        return None if best is None else seconds / best

    def warn(self, times: float, threads: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"Steps take {times:.0f} times as long as they did, with {threads} threads: other processes use the "
                "cores. Wait until they end, or call `torch.set_num_threads(1)`, which no busy core holds up."
            )


class CallPace:
    """Follows the steps of one call."""

    def __init__(self, pace: Pace, settings: Hashable, threads: int) -> None:
        self._pace, self._settings, self._threads = pace, settings, threads
        self._times: deque[float] = deque(maxlen=_STEPS)  # times of the newest steps over their best

    def see(self, record: StepRecord, context: int) -> None:
        """Add a step after the prefill, at `context` positions."""
        if self._threads < 2 or record.verify_seconds <= 0.0:
            return
        # Costs rise with the context, so each power of two has its own
        key = self._settings, record.decoded_rows, record.computed, context.bit_length()
        times = self._pace.times_best(key, record.verify_seconds)
        if times is None:
            return
        self._times.append(times)
        if len(self._times) == _STEPS and median_low(self._times) >= _MANY:
            self._pace.warn(median_low(self._times), self._threads)
