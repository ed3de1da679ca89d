"""Says in one sentence what to use on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..telemetry.report import rate
from .methods import Method
from .timing import PLAIN, AnswerTiming, Interval, compare


NAMED_NODES = 8  # whose verification the sentence names
MIN_PROMPTS = 8  # an interval over fewer is narrower than what it stands for: a bootstrap draws from what it has


@dataclass(frozen=True, slots=True)
class Standing:
    """How one method did.

    Attributes:
        name: in the table.
        effort: what a user must have for it; less is better.
        to_plain: its rate over plain decoding's.
        to_fastest: its rate over the fastest method's; not below 1 beyond noise means as good.
    """

    name: str
    effort: int
    to_plain: Interval
    to_fastest: Interval


def advice_of(methods: Sequence[Method], timings: Sequence[AnswerTiming], verify_cost: float | None) -> str:
    """Say what to use, over all datasets and temperatures together."""
    others = [method for method in methods if method.name != PLAIN]
    if not timings:
        return advise([], verify_cost, 0)
    rates = {method.name: rate(m for m in timings if m.method == method.name) for method in others}
    fastest = max(rates, key=lambda name: rates[name], default=PLAIN)
    standings = [
        Standing(
            method.name,
            method.effort,
            compare(timings, method.name, PLAIN),
            compare(timings, method.name, fastest),
        )
        for method in others
    ]
    return advise(standings, verify_cost, len({m.prompt for m in timings}))


def advise(standings: Sequence[Standing], verify_cost: float | None, prompts: int) -> str:
    """Say what to use. A difference whose 95% interval holds 1 is none.

    Args:
        standings: of every measured method but plain decoding.
        verify_cost: of a forward over `NAMED_NODES` nodes, in plain steps; `None` when unknown.
        prompts: that the intervals are over; one prompt gives no interval.
    """
    if prompts < 2:
        little = "one prompt says" if prompts else "no prompt was answered, which says"
        return f"NOT ENOUGH EVIDENCE: {little} nothing about others. Measure {MIN_PROMPTS} or more with --limit."
    said = _choice(standings, verify_cost)
    if standings and prompts < MIN_PROMPTS:
        return (
            f"NOT ENOUGH EVIDENCE: {prompts} prompts say little about others. Measure {MIN_PROMPTS} or more with "
            f"--limit; on these: {said}"
        )
    return said


def _choice(standings: Sequence[Standing], verify_cost: float | None) -> str:
    if not standings:
        return "Nothing was compared with plain decoding: choose with --methods, --policy or --shapes."
    fastest = max(standings, key=lambda standing: standing.to_plain.ratio)
    if fastest.to_plain.low <= 1:
        return _plain_sentence(fastest, verify_cost)
    equal = [s for s in standings if s is fastest or s.to_fastest.high >= 1]
    simplest = min(equal, key=lambda s: (s.effort, -s.to_plain.ratio))
    if simplest.to_plain.low <= 1:  # as good as the fastest only because little is known about it
        simplest = fastest
    if simplest is fastest:
        return f"Use {fastest.name}: {_times(fastest.to_plain)}."
    return (
        f"{_capital(simplest.name)} is as good as anything here: {_times(simplest.to_plain)}; {fastest.name}, with "
        f"{fastest.to_plain.ratio:.2f}, is not faster beyond noise."
    )


def _plain_sentence(fastest: Standing, verify_cost: float | None) -> str:
    interval = fastest.to_plain
    if interval.high < 1:
        verdict = "Speculation does not pay on this machine"
    else:
        verdict = "Decode plainly: nothing is faster beyond noise on this machine"
    best = f"the fastest, {fastest.name}, reaches {interval.ratio:.2f} ({interval.low:.2f} to {interval.high:.2f})"
    if verify_cost is None:
        return f"{verdict}: {best}."
    return f"{verdict}: verification of {NAMED_NODES} nodes costs {verify_cost:.1f} plain steps, and {best}."


def _times(interval: Interval) -> str:
    return f"{interval.ratio:.2f} times plain decoding ({interval.low:.2f} to {interval.high:.2f})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
