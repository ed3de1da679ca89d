"""What a policy sees, decides and is told.

Knows trees and records, never a head or a model: any drafter can sit behind an observation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..telemetry import StepRecord
from ..tree import DraftTree, TreeShape


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known before drafting.

    Attributes:
        features: `[b, F]` the target's kept hidden states at the newest position it has processed, in its dtype;
            `None` without a head.
        context_length: positions of the text so far, padding included.
        step: 0 for the first decision of a call of `generate`.
        room: tokens that the text may still gain; a deeper tree is cut.
        survival: called, looks the text's end up in the text so far, and answers for i = 1, 2, ... with the
            probability that the first i tokens of that continuation are accepted: empty when it never occurred
            before. In a batch the mean of rows that advance apart, weighted by their urgency, and the least hopeful
            row's of rows in lockstep. Microseconds.
        prompt_seconds: what drafting cost this call before its first step: head and lookup read the prompt. No record
            tells of it; the same at every step.
        urgency: how many tokens one of each row counts, 1.0 on average: a batch ends with the row that lags behind.
            Empty stands for rows that count the same.
    """

    features: Tensor | None
    context_length: int
    step: int
    room: int
    survival: Callable[[], list[float]]
    prompt_seconds: float = 0.0
    urgency: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Level:
    """What is known after a level was drafted.

    Attributes:
        depth: levels drafted so far.
        scores: `[b, k]` fp32 cumulative log probability of the nodes that would get children next.
    """

    depth: int
    scores: Tensor


@runtime_checkable
class Policy(Protocol):
    """Up to three decisions a step; subclass it and override what you decide.

    A policy is never trusted with correctness: whatever it answers, the text stays the target's own.

    What else it tells of itself are attributes that may be missing; a `PolicyWrapper` hands them on.

    What it can do without, true where missing: `needs_head`; `looks_up`, false when it never asks for lookup nodes nor
    calls `Observation.survival`, so that the prompt need not be indexed; and `reads_foreseen`, false when it ignores
    `StepRecord.foreseen`, which then stays 0.

    Whom it serves: `check_identity`, called with `target` and `head` as `pair_identity` gives them, before any work;
    it raises `ValueError` for others than those it was trained for. Any will do where it is missing or `None`.

    What a `Guard` asks, false or `None` where missing: `glances`, true when it learns from a drafted level of which
    nothing is verified; `is_confident`, true once its odds rest on outcomes; and `costs`, the `RunningCosts` that it
    learns itself and lets the guard read.
    """

    def choose(self, observation: Observation) -> TreeShape:
        """The shape of this step; `TreeShape.plain()` drafts nothing."""
        ...

    def grow(self, level: Level) -> bool:
        """Whether to draft another level, up to the chosen depth."""
        return True

    def size(self, scores: Tensor) -> int:
        """Nodes to verify, root included, given the pool's scores `[b, p]`; the chosen `total_tokens` is the most."""
        return scores.shape[-1] + 1

    def observe(self, record: StepRecord) -> None:
        """Learn what the step gave and cost."""
        return None


@runtime_checkable
class Witness(Protocol):
    """A policy that is also shown the tree of every step and what the target made of it, for instance to draw it."""

    def witness(self, tree: DraftTree, path: Tensor, tokens: Tensor) -> None:
        """Called once a step, before `observe`; not timed.

        Args:
            tree: what the target verified, for the rows that had not finished.
            path: `[b, m]` the accepted nodes, root first; a row that accepted fewer repeats its last.
            tokens: `[b, m]` the target's own token after each of them.
        """
        ...
