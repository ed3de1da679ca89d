"""Tells the demo's findings as a table and sentences."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.box import SIMPLE
from rich.table import Table

from transformers_resps.telemetry.display import Decode
from transformers_resps.telemetry.report import SpeculationReport, rate

from .answering import Comparison


@dataclass(frozen=True, slots=True)
class Price:
    """What a step with a tree costs and gives, next to plain steps of the same machine and dtype.

    Attributes:
        nodes: verified in most steps.
        verify_cost: of that forward, in plain steps.
        step_cost: of all the step, drafting included, in plain steps.
        gain: tokens that such a step adds on average.
    """

    nodes: int
    verify_cost: float
    step_cost: float
    gain: float


def price_of(comparisons: Sequence[Comparison]) -> Price | None:
    """Return the price of a tree step, over all prompts; `None` when no step drafted."""
    steps = [
        step for c in comparisons if (s := c.speculative.speculation) for step in s.steps[1:] if step.verified > 1
    ]
    if not steps:
        return None
    ((nodes, _),) = Counter(step.verified for step in steps).most_common(1)
    usual = [step for step in steps if step.verified == nodes]
    plain = median(c.plain.token_seconds for c in comparisons)
    return Price(
        nodes=nodes,
        verify_cost=median(step.verify_seconds for step in usual) / plain,
        step_cost=median(step.step_seconds for step in usual) / plain,
        gain=SpeculationReport(steps=usual).tau,
    )


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Say in one sentence whether a tree pays here, and why."""
    dtype = _name(comparisons[0])
    price = price_of(comparisons)
    if price is None:
        return f"No step drafted in {dtype}."
    pays = "pays" if price.gain > price.step_cost else "does not pay"
    return (
        f"On this machine in {dtype}, verifying {price.nodes} nodes costs {price.verify_cost:.1f} plain steps; the "
        f"whole step costs {price.step_cost:.1f} and adds {price.gain:.1f} tokens: this tree {pays}."
    )


def table(comparisons: Sequence[Comparison]) -> Table:
    """Return a row per prompt, and one for all in the first dtype."""
    result = Table(title="Tokens per second, plain and with the draft tree, in turn", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("prompt", "dtype", "same text"):
        result.add_column(name, no_wrap=True)
    for name in ("plain/s", "tree/s", "ratio", "tau", "nodes"):
        result.add_column(name, justify="right", no_wrap=True)
    for comparison in comparisons:
        result.add_row(*_cells(comparison.kind, _same_text(comparison), [comparison]))
    first = [c for c in comparisons if c.dtype == comparisons[0].dtype]
    result.add_section()
    same = sum(c.divergence is None for c in first)
    result.add_row(*_cells("all", f"{same} of {len(first)}", first))
    return result


def _name(comparison: Comparison) -> str:
    return str(comparison.dtype).removeprefix("torch.")


def _same_text(comparison: Comparison) -> str:
    if comparison.divergence is None:
        return "yes"
    reason = "near-tie" if comparison.passed else "UNEXPLAINED"
    return f"to {comparison.divergence.position}: {reason}"


def _cells(kind: str, same: str, comparisons: Sequence[Comparison]) -> list[str]:
    plain, tree = rate(c.plain for c in comparisons), rate(c.speculative for c in comparisons)
    reports = [c.speculative.speculation for c in comparisons if c.speculative.speculation]
    rates = [f"{plain:.1f}", f"{tree:.1f}", f"{tree / plain:.2f}x"]
    numbers = [*rates, f"{tau_of(reports):.2f}", f"{nodes_of(reports):.1f}"]
    return [kind, _name(comparisons[0]), same, *numbers]


def tau_of(reports: Sequence[SpeculationReport]) -> float:
    """Return the mean tokens that a row gained per target forward until it finished, over all calls."""
    return SpeculationReport(steps=[step for report in reports for step in report.steps]).tau


def nodes_of(reports: Sequence[SpeculationReport]) -> float:
    """Return the mean nodes per target forward after the prefill, root included, over all calls; 1 without any."""
    verified = [step.verified for report in reports for step in report.steps[1:]]
    return sum(verified) / len(verified) if verified else 1.0


def divergence_line(comparison: Comparison, decode: Decode) -> str:
    """Say where the texts part: both tokens, the logit gap and the dtype's spacing."""
    found = comparison.divergence
    assert found is not None

    def quoted(token: int | None) -> str:
        return "the end" if token is None else repr(decode([token]))

    dtype = _name(comparison)
    cause = "rounding at a near-tie" if comparison.passed else f"NOT explained by rounding in {dtype}"
    return (
        f"{comparison.kind}: the outputs differ from token {found.position} on: plain {quoted(found.plain_token)}, "
        f"tree {quoted(found.speculative_token)}. Logit gap {found.gap:.3g}, spacing of {dtype} there "
        f"{found.spacing:.3g}: {cause}."
    )
