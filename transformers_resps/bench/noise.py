"""Whether the machine is quiet enough to measure on."""

from collections.abc import Sequence

from .timing import PLAIN, AnswerTiming, plain_spread


MAX_LOAD = 0.5  # CPUs that other processes may use before the start
MAX_SPREAD = 0.25  # interquartile range over median of plain decoding's rates
_MIN_ANSWERS = 8  # before the spread is checked
_WAY_OUT = "or pass --accept-noise (the results will say so)"


class BusyMachine(ValueError):  # noqa: N818  # a state of the machine
    """Other processes use the machine, so measurements on it are not valid."""


def check_load(load: float | None) -> None:
    """Refuse to start.

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


def check_spread(timings: Sequence[AnswerTiming], journal: str) -> None:
    """Refuse to go on.

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
