"""Whether the machine is quiet enough to measure on. Knows numbers only."""

from collections.abc import Sequence

from .measurement import PLAIN, Measurement, plain_spread


MOST_LOAD = 0.5  # processors that others may keep busy before the start
MOST_SPREAD = 0.25  # interquartile range over median of plain decoding's rates
_LEAST_ANSWERS = 8  # before the spread is believed
_WAY_OUT = "or pass --accept-noise: the results will say so"


class BusyMachine(ValueError):  # noqa: N818  # a state of the machine
    """Others use the machine, so nothing measured on it holds."""


def check_load(load: float | None) -> None:
    """Refuse to start.

    Args:
        load: processors that others keep busy; `None` when unknown.

    Raises:
        BusyMachine: more than `MOST_LOAD`.
    """
    if load is not None and load > MOST_LOAD:
        raise BusyMachine(
            f"Other processes keep {load:.1f} processors busy, but at most {MOST_LOAD} may be for a measurement. Wait "
            f"until they are done, {_WAY_OUT}."
        )


def check_spread(measurements: Sequence[Measurement], journal: str) -> None:
    """Refuse to go on.

    Raises:
        BusyMachine: the rates of plain decoding spread more than `MOST_SPREAD`.
    """
    answers = sum(m.method == PLAIN for m in measurements)
    spread = plain_spread(measurements) if answers >= _LEAST_ANSWERS else None
    if spread is not None and spread > MOST_SPREAD:
        raise BusyMachine(
            f"Plain decoding's rates spread by {spread:.0%} (interquartile range over median, {answers} answers), but "
            f"at most {MOST_SPREAD:.0%} may be: the machine was busy. Delete {journal} and measure again when it is "
            f"quiet, {_WAY_OUT}."
        )
