"""Tells the demo's findings as a table and sentences."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from transformers_resps.telemetry.report import SpeculationReport, rate

from .answering import AUTO, LOOKUP, PLAIN, TREE, Answers, TimedAnswer


README_RATIO, README_MACHINE = 6.3, "an AMD EPYC with bfloat16 units"
_TOLD = {
    PLAIN: "plain decoding",
    LOOKUP: 'lookup: policy="auto" alone',
    TREE: "tree: the head's own",
    AUTO: 'auto: head, policy="auto"',
}
WORDS = (
    "tau: tokens that one forward of the model yields, 1 when nothing is drafted. nodes: tokens that a forward "
    "reads at once, the newest and the guesses after it."
)
NORMAL_MODE = (
    "Without `invariant=True` bfloat16 is a little faster, and its text equal up to rounding: docs/lossless.md says "
    "when two tokens are that near."
)
FASTER = 'One line makes it faster, in a process that lives for minutes: attach(model, compile="auto")'


def table(answers: Sequence[Answers]) -> Table:
    """Return a row per method, over all prompts."""
    result = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    result.add_column("method", no_wrap=True)
    for name in ("tokens/s", "times plain", "tau", "nodes", "same text"):
        result.add_column(name, justify="right", no_wrap=True)
    for method in answers[0].by_method:
        same = f"{sum(one.is_same(method) for one in answers)} of {len(answers)}"
        reports = [found for one in of(answers, method) if (found := one.speculation)]
        told = [f"{rate(of(answers, method)):.1f}", f"{ratio(answers, method):.2f}", f"{tau_of(reports):.2f}"]
        result.add_row(_TOLD[method], *told, f"{nodes_of(reports):.1f}", same)
    return result


def of(answers: Sequence[Answers], method: str) -> list[TimedAnswer]:
    """The answers of one method."""
    return [one.by_method[method] for one in answers]


def ratio(answers: Sequence[Answers], method: str) -> float:
    """Tokens per second over those of plain decoding, all tokens over all seconds."""
    return rate(of(answers, method)) / rate(of(answers, PLAIN))


def verdict(answers: Sequence[Answers], machine: str) -> str:
    """Say how much faster the fastest method is here, whether all texts are equal, and why README's figure differs."""
    fastest = max((method for method in answers[0].by_method if method != PLAIN), key=lambda way: ratio(answers, way))
    gain = ratio(answers, fastest)
    speed = (
        f"{fastest} is {gain:.1f}x plain decoding"
        if gain > 1
        else f"nothing is faster than plain ({fastest} {gain:.1f}x)"
    )
    same = "and every text is the plain one" if all(one.are_same for one in answers) else "but NOT every text is equal"
    return (
        f"On this machine ({machine}) {speed}, {same}. README's {README_RATIO}x stock generate is of compiled "
        f"steps on {README_MACHINE}, after more and longer answers."
    )


def tau_of(reports: Sequence[SpeculationReport]) -> float:
    """Return the mean tokens that a row gained per target forward until it finished, over all calls; 1 without any."""
    steps = [step for report in reports for step in report.steps]
    return SpeculationReport(steps=steps).tau if steps else 1.0


def nodes_of(reports: Sequence[SpeculationReport]) -> float:
    """Return the mean nodes per target forward after the prefill, root included, over all calls; 1 without any."""
    verified = [step.verified for report in reports for step in report.steps[1:]]
    return sum(verified) / len(verified) if verified else 1.0
