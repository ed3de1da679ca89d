"""Whether the machine was quiet while a process measured: probes before and after, neighbours, plain's own spread."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from transformers_resps.tools.quiet import MAX_LOAD, other_load


MAX_NEIGHBOURS = 0.1  # processors that others use on average while a process measures
MAX_PROBE_SPREAD = 0.2  # interquartile range over median of one probe
MAX_DRIFT = 0.2  # of the second probe's median from the first's
MAX_PLAIN_SPREAD = 0.15  # interquartile range over median of plain decoding's rates
MAX_APART = 0.1  # of the processes' plain rates: highest over lowest, minus one
_PROBES = 60
_PAUSE = 0.1  # seconds between them: on a shared host the speed of memory moves within seconds
_SIZE = 1024


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
    """Watches one process from `begin` to `end`; `reasons` says what was not quiet."""

    load_before: float | None = None
    neighbours: float | None = None
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    plain_spread: float | None = None
    load_average: float | None = None

    def begin(self) -> None:
        self.load_before = other_load()
        self.before = probe()
        self._started = _busy_seconds()

    def end(self, plain_spread: float | None) -> None:
        wall, busy = (now - then for now, then in zip(_busy_seconds(), self._started, strict=True))
        self.neighbours = max(busy, 0.0) / wall if wall > 0 and Path("/proc/stat").exists() else None
        self.after, self.plain_spread = probe(), plain_spread
        self.load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    @property
    def reasons(self) -> list[str]:
        """Each in a few words, with its figure; empty if it was quiet."""
        return [
            *_above("others used {:.1f} processors before it", self.load_before, MAX_LOAD),
            *_above("others used {:.2f} processors during it", self.neighbours, MAX_NEIGHBOURS),
            *_above("the first probe spread by {:.0%}", spread_of(self.before), MAX_PROBE_SPREAD),
            *_above("the last probe spread by {:.0%}", spread_of(self.after), MAX_PROBE_SPREAD),
            *_above("the probes differ by {:.0%}", drift_of(self.before, self.after), MAX_DRIFT),
            *_above("plain decoding's rates spread by {:.0%}", self.plain_spread, MAX_PLAIN_SPREAD),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reasons": self.reasons}


def spread_of(seconds: Sequence[float]) -> float | None:
    """Return the interquartile range over the median; `None` for fewer than four."""
    if len(seconds) < 4:
        return None
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle


def drift_of(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Return by how much the second median is off the first."""
    return abs(median(after) / median(before) - 1) if before and after else None


def apart(plain_rates: Sequence[float]) -> list[str]:
    """Say whether plain decoding's rates of the processes of an experiment lie too far apart."""
    return _above("its processes lie {:.0%} apart", max(plain_rates) / min(plain_rates) - 1, MAX_APART)


def _above(reason: str, value: float | None, most: float) -> list[str]:
    return [] if value is None or value <= most else [reason.format(value)]


def _busy_seconds(stat: Path = Path("/proc/stat")) -> tuple[float, float]:
    """Return seconds now, and those of all processors that others were busy since the machine started."""
    busy = 0.0
    if stat.exists():
        numbers = [int(part) for part in stat.read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy - sum(os.times()[:4]) - sum(map(_seconds_of, _children(os.getpid())))


def _children(process: int) -> list[int]:
    """Return the processes that it started and that still run, and theirs; they are no neighbours."""
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *_children(child)]
    return found


def _seconds_of(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
