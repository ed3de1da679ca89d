"""Check that no other process keeps the machine busy, before PyTorch is loaded and a measurement starts."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles


MAX_LOAD = 0.5  # number of CPUs that other processes may use before a measurement
NOISE_OPTION = "or pass --accept-noise (the results will say so)"


class BusyMachineError(ValueError):
    """Other processes use the machine, so measurements are not valid."""


def checked_load(accept_noise: bool) -> float | None:
    """Return how many CPUs other processes use (`None`: unknown); unless `accept_noise`, raise above `MAX_LOAD`."""
    load = other_load()
    if load is not None and load > MAX_LOAD and not accept_noise:
        raise BusyMachineError(
            f"Other processes use {load:.1f} CPUs, but at most {MAX_LOAD} may be in use during a measurement. Wait "
            f"until they are done, {NOISE_OPTION}."
        )
    return load


def other_load(seconds: float = 1.0) -> float | None:
    """Return how many CPUs other processes use while this one waits for `seconds`; `None` if unknown.

    The load average would also count the last run of this command, so it is used only where /proc/stat is missing.
    """
    counters = Path("/proc/stat")
    if not counters.exists():
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def idle_and_all() -> tuple[int, int]:
        numbers = [int(part) for part in counters.read_text().split("\n", 1)[0].split()[1:9]]
        return numbers[3] + numbers[4], sum(numbers)  # idle (also while waiting for a disk), and all

    before = idle_and_all()
    time.sleep(seconds)
    idle, total = (now - then for now, then in zip(idle_and_all(), before, strict=True))
    return (1 - idle / total) * (os.cpu_count() or 1) if total else None


def spread_of(values: Sequence[float]) -> float | None:
    """Return the interquartile range divided by the median; `None` for fewer than four values."""
    if len(values) < 4:
        return None
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / middle
