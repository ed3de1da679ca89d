"""Sums up the steps of many answers: where their time went, how many nodes they verified, and when."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..telemetry.report import SpeculationReport


BUCKETS = ("plain", "2 to 4", "5 to 8", "9 to 16", "17 to 32", "above 32")  # nodes verified
_MAX_NODES = (1, 4, 8, 16, 32)
STEPS_PER_BIN = 8


class Step(NamedTuple):
    """One step as the journal keeps it; `shape` is total_tokens, depth, top_k and lookup."""

    shape: tuple[int, int, int, int]
    verified: int
    emitted: int
    draft_seconds: float
    verify_seconds: float
    step_seconds: float


def steps_of(report: SpeculationReport) -> list[Step]:
    """Return all steps of an answer, the prefill first."""
    return [
        Step(
            (step.shape.total_tokens, step.shape.depth, step.shape.top_k, step.shape.lookup),
            step.verified,
            step.emitted_total,
            step.draft_seconds,
            step.verify_seconds,
            step.step_seconds,
        )
        for step in report.steps
    ]


@dataclass(frozen=True, slots=True)
class StepSummary:
    """The steps of all answers of one method, summed up.

    Attributes:
        mean_nodes: verified in a step, prefill left out.
        prefill_seconds: per token of the answers, as all of these.
        draft_seconds: observing, choosing, drafting and sizing.
        verify_seconds: the target's forwards after prefill.
        rest_seconds: acceptance, the caches, and `generate` around the steps.
        sizes: for each eight steps of an answer, how many verified 1, 2 to 4, 5 to 8, ... nodes: see `BUCKETS`.
        shapes: the most frequent choices, `total_tokens/depth/top_k+lookup` -> steps.
    """

    mean_nodes: float
    prefill_seconds: float
    draft_seconds: float
    verify_seconds: float
    rest_seconds: float
    sizes: list[list[int]]
    shapes: dict[str, int]


def summarise_steps(answers: Sequence[Sequence[Step]], tokens: int, seconds: float) -> StepSummary:
    """Sum up answers with `tokens` in all that took `seconds` in all."""
    decoding = [step for steps in answers for step in steps[1:]]
    prefill = sum(steps[0].step_seconds for steps in answers)
    draft, verify = sum(step.draft_seconds for step in decoding), sum(step.verify_seconds for step in decoding)
    most = max(len(steps) - 1 for steps in answers)
    sizes = [[0] * len(BUCKETS) for _ in range(0, most, STEPS_PER_BIN)]
    for steps in answers:
        for number, step in enumerate(steps[1:]):
            sizes[number // STEPS_PER_BIN][bucket_of(step.verified)] += 1
    shapes = Counter(shape_text(step.shape) for step in decoding)
    return StepSummary(
        mean_nodes=sum(step.verified for step in decoding) / len(decoding) if decoding else 1.0,
        prefill_seconds=prefill / tokens,
        draft_seconds=draft / tokens,
        verify_seconds=verify / tokens,
        rest_seconds=(seconds - prefill - draft - verify) / tokens,
        sizes=sizes,
        shapes=dict(shapes.most_common(8)),
    )


def bucket_of(nodes: int) -> int:
    """Return the index into `BUCKETS`."""
    return sum(nodes > most for most in _MAX_NODES)


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as `8/4/2+6`."""
    total_tokens, depth, top_k, lookup = shape
    return f"{total_tokens}/{depth}/{top_k}" + (f"+{lookup}" if lookup else "")
