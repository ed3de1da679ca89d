"""What a policy sees, decides and learns from.

It knows trees and records, never a head or a model, so that any drafter can make the observations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..telemetry.report import StepRecord
from ..tree import DraftTree, TreeShape


@dataclass(frozen=True, slots=True)
class Observation:
    """What a policy sees before a step is drafted.

    Attributes:
        features: `[b, F]` the target's hidden states that the head reads, concatenated, at the newest position that
            the target has processed, in its dtype; `None` without a head.
        context_length: positions of the sequence so far, padding included.
        step: 0 for the first decision in a call of `generate`.
        room: tokens that the sequence may still gain; a deeper tree is cut.
        prefix_accept_probs: callable; looks up the end of the sequence in the sequence so far and returns, for i = 1,
            2, ..., the probability that the first i looked-up tokens are accepted; `[]` without a match. Batches: the
            mean over rows, weighted by `row_weights` (ragged), or the least promising row (lockstep). Takes
            microseconds.
        prompt_seconds: seconds that drafting took before the first step, in which head and lookup read the prompt. The
            same at every step, and in no record that `observe` gets.
        row_weights: how much one token of each row counts, 1.0 on average. Rows that lag weigh more, because a batch
            ends with its slowest row. Empty if all rows count the same.
    """

    features: Tensor | None
    context_length: int
    step: int
    room: int
    prefix_accept_probs: Callable[[], list[float]]
    prompt_seconds: float = 0.0
    row_weights: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Level:
    """What a policy sees after a level was drafted.

    Attributes:
        depth: levels drafted so far.
        scores: `[b, k]` fp32 cumulative log probabilities of the nodes that would get children next.
    """

    depth: int
    scores: Tensor


@runtime_checkable
class Policy(Protocol):
    """The decisions of a step, up to three. Subclass it, and override what you decide.

    A policy affects speed only: whatever it decides, the output stays the target's own.

    Optional attributes, with the value that a missing one stands for:

    - `needs_head` (true): false if it works without a head.
    - `uses_lookup` (true): false if it never asks for lookup nodes nor calls `Observation.prefix_accept_probs`; the
      prompt is then not indexed.
    - `needs_drafted_match` (true): false if it ignores `StepRecord.drafted_match`, which then stays 0.
    - `check_identity` (`None`): called before any work with `target` and `head`, as `pair_identity` returns them;
      raises `ValueError` for others than those it was trained for.
    - `probes_head` (false): true if it learns from draft-only probes, of which nothing is verified.
      `BaselineGuard` reads it.
    - `is_confident` (false): true once its estimates rest on observed outcomes. `BaselineGuard` reads it.
    - `costs` (`None`): the `RunningCosts` that it learns itself, for `BaselineGuard` to read.
    """

    def choose(self, observation: Observation) -> TreeShape:
        """Return the shape of this step; `TreeShape.plain()` drafts nothing."""
        ...

    def grow(self, level: Level) -> bool:
        """Return whether to draft another level, up to the chosen depth."""
        return True

    def size(self, scores: Tensor) -> int:
        """Return how many nodes to verify, root included, given the pool's scores `[b, p]`; at most `total_tokens`."""
        return scores.shape[-1] + 1

    def observe(self, record: StepRecord) -> None:
        """Learn from the record of a finished step."""
        return None


@runtime_checkable
class StepObserver(Protocol):
    """A policy that is also shown every verified tree and the target's picks, for instance to draw them."""

    def on_verified(self, tree: DraftTree, path: Tensor, tokens: Tensor) -> None:
        """Called once a step, before `observe`; not timed.

        Args:
            tree: what the target verified, for the rows that had not finished.
            path: `[b, m]` the accepted nodes, root first; a row that accepted fewer repeats its last.
            tokens: `[b, m]` the target's pick after each of them.
        """
        ...
