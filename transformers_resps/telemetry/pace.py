"""Warns when steps take many times as long as before, because other processes use the CPU's cores.

If another process uses one core, two threads may be 10 to 100 times slower, since each matrix product waits for the
slower thread.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Hashable
from statistics import median, median_low

from .report import StepRecord


logger = logging.getLogger(f"transformers.{__name__}")

_MANY = 5.0  # A forward is too slow if it takes this many times its best time; a doubled context explains only 2.
_STEPS = 8  # The median of this many steps must be too slow, so that single interruptions cause no warning.
_ENOUGH = 5  # A best time is the lowest median of this many successive forwards of the same size.


class Pace:
    """Warns once if forwards become far slower than earlier forwards of equal size; a slow start causes no warning."""

    def __init__(self) -> None:
        self._best: dict[Hashable, float] = {}  # settings, sizes and context -> seconds
        self._newest: defaultdict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=_ENOUGH))
        self._times: deque[float] = deque(maxlen=_STEPS)  # of the newest steps: time divided by best time
        self._has_warned = False

    def see(self, record: StepRecord, context: int, threads: int, settings: Hashable) -> None:
        """Record a step (not the prefill) that began after `context` positions; warn if the newest steps are too slow.

        Times are compared only between steps with equal `settings`; `threads` is the number of CPU threads.
        """
        seconds = record.verify_seconds
        if threads < 2 or seconds <= 0.0:
            return
        # Forwards take longer with more context, so each power of two has its own best time
        key = settings, record.decoded_rows, record.computed, context.bit_length()
        best, newest = self._best.get(key), self._newest[key]
        newest.append(seconds)
        if len(newest) == _ENOUGH:
            self._best[key] = median(newest) if best is None else min(median(newest), best)
        if best is None:
            return
        self._times.append(seconds / best)
        times = median_low(self._times)
        if len(self._times) == _STEPS and times >= _MANY and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"Steps take {times:.0f} times as long as they did, with {threads} threads: other processes use the "
                "cores. Wait until they end, or call `torch.set_num_threads(1)`, which no busy core holds up."
            )
