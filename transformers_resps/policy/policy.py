"""The base class of all policies: what a policy sees, decides, learns from and tells of itself.

Trees and records only, never a head or a model, so that any drafter can make the observations.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..telemetry.report import StepRecord
from ..tree import DraftTree, TreeShape
from .costs import RunningCosts
from .identity import Identity, check_same


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
        reads_paths: whether the target has recurrent layers, which read every path from the root to a leaf: their work
            grows with the leaves times the depth.
    """

    features: Tensor | None
    context_length: int
    step: int
    room: int
    prefix_accept_probs: Callable[[], list[float]]
    prompt_seconds: float = 0.0
    row_weights: Sequence[float] = ()
    reads_paths: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """What a policy sees after a level was drafted.

    Attributes:
        depth: levels drafted so far.
        scores: `[b, k]` fp32 cumulative log probabilities of the nodes that would get children next.
    """

    depth: int
    scores: Tensor


class Policy(ABC):
    """Decides how each step drafts. Subclass it, write `choose`, and override what else you decide.

    A policy affects speed only: whatever it decides, the output stays the target's own. The attributes tell what it
    needs and what it can do; set them in the class or on the object.

    Attributes:
        needs_head: false if it works without a head.
        uses_lookup: false if it never asks for lookup nodes nor calls `Observation.prefix_accept_probs`; the prompt is
            then not indexed.
        needs_drafted_match: false if it ignores `StepRecord.drafted_match`, which then stays 0.
        grows: false if it never stops between two levels. `grow` is then not asked, and all levels are drafted in one
            go, which accelerators are fast at. Read after each `choose`.
        probes_head: true if it learns from draft-only probes, of which nothing is verified. `BaselineGuard` reads it.
        costs: the costs of a step that it learns itself, which `BaselineGuard` then reads; `None` if it learns none.
        target_identity: the target that it was trained for, as `pair_identity` returns it; `None` for any.
        head_identity: likewise the head. Its weights are hashed only for a policy with an identity.
    """

    needs_head: bool = True
    uses_lookup: bool = True
    needs_drafted_match: bool = True
    grows: bool = True
    probes_head: bool = False
    costs: RunningCosts | None = None
    target_identity: Identity | None = None
    head_identity: Identity | None = None

    @property
    def is_confident(self) -> bool:
        """Whether its estimates rest on observed outcomes by now. `BaselineGuard` reads it."""
        return False

    @property
    def has_identity(self) -> bool:
        """Whether it was trained for one target or head."""
        return self.target_identity is not None or self.head_identity is not None

    def check_identity(self, *, target: Identity | None = None, head: Identity | None = None) -> None:
        """Refuse another target or head than the policy was trained for; called before any work if it has an identity.

        Args:
            target: identity of the target, as `pair_identity` returns it; `None` is not compared.
            head: likewise of the head.

        Raises:
            ValueError: one differs; the message names both sides.
        """
        check_same("target", self.target_identity, target)
        check_same("head", self.head_identity, head)

    @abstractmethod
    def choose(self, observation: Observation) -> TreeShape:
        """Return the shape of this step; `TreeShape.plain()` drafts nothing."""

    def grow(self, level: Level) -> bool:
        """Return whether to draft another level, up to the chosen depth. Not asked if `grows` is false."""
        return True

    def size(self, scores: Tensor, levels: Tensor) -> int:
        """Return how many nodes to verify, root included; at most `total_tokens` are.

        Args:
            scores: `[b, p]` fp32 cumulative log probabilities of the pool's nodes, every parent before its children.
            levels: `[p]` their levels, ascending; 1 for children of the root.
        """
        return scores.shape[-1] + 1

    def on_verified(self, tree: DraftTree, path: Tensor, tokens: Tensor) -> None:
        """Look at what was verified, for instance to draw it. Called once a step, before `observe`; not timed.

        Args:
            tree: what the target verified, for the rows that had not finished.
            path: `[b, m]` the accepted nodes, root first; a row that accepted fewer repeats its last.
            tokens: `[b, m]` the target's pick after each of them.
        """
        return None

    def observe(self, record: StepRecord) -> None:
        """Learn from the record of a finished step."""
        return None
