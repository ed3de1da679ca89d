"""Whether other processes disturbed a measurement: their load, and for absolute times a probe of fixed work."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil

from transformers_resps.tools.quiet import MAX_LOAD, other_load, spread_of


MAX_NEIGHBOURS = 0.1  # processors that others use on average while a process measures
MAX_APART = 0.1  # distance of a process's ratios from those of the nearest other process
MAX_PROBE_SPREAD = 0.2  # interquartile range over median of one probe
MAX_DRIFT = 0.2  # distance of the second probe's median from the first's
MAX_PLAIN_SPREAD = 0.15  # interquartile range over median of plain decoding's rates
_PROBES = 60
_PAUSE = 0.1  # seconds between them: on a shared host the speed of memory moves within seconds
_SIZE = 1024  # rows of the probe's matrix


def probe(
    work: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[float]:
    """Time fixed work 60 times within some seconds, after a first one: a product of two matrices, a copy of 64 MiB."""
    work = work or _fixed_work()
    work()
    seconds = []
    for _ in range(_PROBES):
        started = clock()
        work()
        seconds.append(clock() - started)
        sleep(_PAUSE)
    return seconds


def _fixed_work() -> Callable[[], Any]:
    import torch

    matrix, memory, copied = torch.ones(_SIZE, _SIZE), torch.ones(16 << 20), torch.ones(16 << 20)
    return lambda: (matrix @ matrix, copied.copy_(memory))


@dataclass
class Watch:
    """Watches a process from `begin` to `end`; seconds are those of the probes."""

    load_before: float | None = None
    neighbours: float | None = None
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    plain_spread: float | None = None
    load_average: float | None = None

    def begin(self) -> None:
        self.load_before = other_load()
        self.before = probe()
        self._started, self._taken = time.monotonic(), _seconds_of_others()

    def end(self, plain_spread: float | None) -> None:
        wall = time.monotonic() - self._started
        self.neighbours = max(_seconds_of_others() - self._taken, 0.0) / wall if wall > 0 else None
        self.after, self.plain_spread = probe(), plain_spread
        self.load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    @property
    def reasons(self) -> list[str]:
        """Why no ratio of the process counts, each with its figure; empty if others left it alone."""
        return [
            *_above("others used {:.1f} processors before it", self.load_before, MAX_LOAD),
            *_above("others used {:.2f} processors during it", self.neighbours, MAX_NEIGHBOURS),
        ]

    @property
    def reasons_against_times(self) -> list[str]:
        """Why no absolute time of the process counts: the arms of a ratio take turns, seconds do not."""
        first, last = (median(seconds) if seconds else None for seconds in (self.before, self.after))
        drift = abs(last / first - 1) if first and last else None
        return [
            *self.reasons,
            *_above("the first probe spread by {:.0%}", spread_of(self.before), MAX_PROBE_SPREAD),
            *_above("the last probe spread by {:.0%}", spread_of(self.after), MAX_PROBE_SPREAD),
            *_above("the probes differ by {:.0%}", drift, MAX_DRIFT),
            *_above("plain decoding's rates spread by {:.0%}", self.plain_spread, MAX_PLAIN_SPREAD),
        ]


def apart(ratios: Sequence[Sequence[float]]) -> list[list[str]]:
    """Say for each process whether its ratios lie apart from those of every other process.

    `ratios` are of each process's arms. Two processes lie as far apart as the median of their arms does: one arm alone
    may differ, as where it samples another text.
    """
    found = []
    for place, own in enumerate(ratios):
        others = [other for number, other in enumerate(ratios) if number != place and own]
        nearest = min(
            (median(abs(a / b - 1) for a, b in zip(own, other, strict=True)) for other in others), default=0.0
        )
        found.append(_above("its ratios lie {:.0%} off the other processes'", nearest, MAX_APART))
    return found


def _above(reason: str, value: float | None, most: float) -> list[str]:
    return [] if value is None or value <= most else [reason.format(value)]


def _seconds_of_others() -> float:
    """Return the seconds that other processes kept processors busy since the machine started."""
    told, own = psutil.cpu_times(), psutil.Process()
    busy = sum(told[:8]) - told.idle - getattr(told, "iowait", 0.0)
    return busy - sum(own.cpu_times()[:4]) - sum(map(_seconds_of, own.children(recursive=True)))


def _seconds_of(process: psutil.Process) -> float:
    try:
        return sum(process.cpu_times()[:2])
    except psutil.Error:  # it has ended
        return 0.0
