"""Whether steps take many times as long as they did: then other processes use the cores.

Two threads beside a busy core are 10 to 100 times slower, since each product of matrices waits for the slower thread.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Hashable
from statistics import median, median_low

from .report import StepRecord


logger = logging.getLogger(f"transformers.{__name__}")

_MANY = 5.0  # times what a forward of the same size took at its best; attention over a context twice as long takes 2
_STEPS = 8  # in whose median an interruption does not show
_ENOUGH = 5  # forwards of one size whose median is known to be sustained


class Pace:
    """What forwards of a model took at their best, call after call. A model owns one.

    A neighbour that was busy from the first step on goes unnoticed: nothing else is known then.
    """

    def __init__(self) -> None:
        self._best: dict[Hashable, float] = {}  # settings, nodes and context -> seconds
        self._newest: defaultdict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=_ENOUGH))
        self._has_warned = False

    def of_call(self, settings: Hashable, threads: int) -> "CallPace":
        """The steps of a call by `threads` of the CPU; what a forward takes depends on its `settings`, sizes aside."""
        return CallPace(self, settings, threads)

    def times_best(self, key: Hashable, seconds: float) -> float | None:
        """How many times as long as at its best a forward took; `None` while that is unknown. It is then learned."""
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
    """Sees the steps of one call; see `Pace.of_call`."""

    def __init__(self, pace: Pace, settings: Hashable, threads: int) -> None:
        self._pace, self._settings, self._threads = pace, settings, threads
        self._times: deque[float] = deque(maxlen=_STEPS)  # as long as at its best, of the newest steps

    def see(self, record: StepRecord, context: int) -> None:
        """Take in a step after the prefill, which read so many positions before."""
        if self._threads < 2 or record.verify_seconds <= 0.0:
            return
        # A context of another power of two has costs of its own: they rise with it
        key = self._settings, record.decoded_rows, record.computed, context.bit_length()
        times = self._pace.times_best(key, record.verify_seconds)
        if times is None:
            return
        self._times.append(times)
        if len(self._times) == _STEPS and median_low(self._times) >= _MANY:
            self._pace.warn(median_low(self._times), self._threads)
