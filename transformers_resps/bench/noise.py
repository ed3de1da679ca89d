"""Checks that the machine is quiet enough to measure on."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import quantiles

from .timing import PLAIN, AnswerTiming, grouped


MAX_LOAD = 0.5  # CPUs that other processes may use before the start
MAX_SPREAD = 0.25  # interquartile range over median of plain decoding's rates
_MIN_ANSWERS = 8  # before the spread is checked
_MIN_TOKENS = 8  # of an answer that counts for the spread
_MIN_REPEATED = 8  # rates of texts that were repeated, before those that were not are left out
_WAY_OUT = "or pass --accept-noise (the results will say so)"


class BusyMachine(ValueError):  # noqa: N818  # a state of the machine
    """Other processes use the machine, so measurements on it are not valid."""


def other_load(seconds: float = 1.0) -> float | None:
    """Return how many CPUs others use while this process waits for `seconds`; `None` if the system does not tell.

    The load average would include this command's own last run.
    """
    counters = Path("/proc/stat")
    if not counters.exists():
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def idle_and_all() -> tuple[int, int]:
        numbers = [int(part) for part in counters.read_text().split("\n", 1)[0].split()[1:9]]
        return numbers[3] + numbers[4], sum(numbers)  # idle and waiting for a disk; all

    idle, total = idle_and_all()
    time.sleep(seconds)
    idle, total = (after - before for after, before in zip(idle_and_all(), (idle, total), strict=True))
    return (1 - idle / total) * (os.cpu_count() or 1) if total else None


def check_load(load: float | None) -> None:
    """Refuse to start on a busy machine.

    Args:
        load: CPUs that other processes use; `None` when unknown.

    Raises:
        BusyMachine: more than `MAX_LOAD`.
    """
    if load is not None and load > MAX_LOAD:
        raise BusyMachine(
            f"Other processes use {load:.1f} CPUs, but at most {MAX_LOAD} may be in use during a measurement. Wait "
            f"until they are done, {_WAY_OUT}."
        )


def plain_spread(timings: Iterable[AnswerTiming]) -> float | None:
    """Return the noise: interquartile range over median of plain decoding's rates; `None` below four of them.

    Prefill is left out, and each rate is divided by the mean of its own text's repeats, so that long prompts do not
    look like noise. In the middle of the second repeat only texts that were repeated count, or, while they are few,
    the means of all. Answers of fewer than eight tokens do not count.
    """
    told = [m for m in timings if m.method == PLAIN and m.tokens >= _MIN_TOKENS]
    texts = [
        [(m.tokens - 1) / (m.seconds - m.prefill_seconds) for m in part]
        for part in grouped(told, lambda m: (m.prompt, m.turn, m.temperature))
    ]
    repeated = [own for own in texts if len(own) > 1]
    if len(repeated) == len(texts) or sum(map(len, repeated)) >= _MIN_REPEATED:
        rates = [value / (sum(own) / len(own)) for own in repeated for value in own]
    else:
        rates = [sum(own) / len(own) for own in texts]
    if len(rates) < 4:
        return None
    low, middle, high = quantiles(rates, n=4, method="inclusive")
    return (high - low) / middle


def check_spread(timings: Sequence[AnswerTiming], journal: str) -> None:
    """Refuse to go on where plain decoding's rates show noise.

    Raises:
        BusyMachine: the rates of plain decoding spread more than `MAX_SPREAD`.
    """
    answers = sum(m.method == PLAIN for m in timings)
    spread = plain_spread(timings) if answers >= _MIN_ANSWERS else None
    if spread is not None and spread > MAX_SPREAD:
        raise BusyMachine(
            f"The machine is noisy: plain decoding's rates spread by {spread:.0%} (interquartile range over median, "
            f"{answers} answers), more than {MAX_SPREAD:.0%}. Delete {journal} and measure again when it is quiet, "
            f"{_WAY_OUT}."
        )
