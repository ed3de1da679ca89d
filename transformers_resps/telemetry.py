"""What a call of `generate` did, step by step.

Knows `TreeShape` only. Every rate the project publishes is computed here, from these records.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from .tree import TreeShape


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One target forward and all that surrounds it.

    Attributes:
        shape: what was asked for, after clipping to the room that is left.
        drafted: nodes that the drafters scored.
        verified: nodes of the target forward, root included.
        accepted: drafted tokens kept; for a batch one number per row.
        emitted: tokens added to the text, `accepted + 1`; for a batch one number per row, 0 for finished rows.
        draft_seconds: observing, choosing, drafting and sizing.
        verify_seconds: the target forward.
        step_seconds: the whole step, policy and bookkeeping included.
        foreseen: how many of the step's tokens, from the first, the head's candidates hold as a path, whether or not
            they were verified; the least of a batch.
    """

    shape: TreeShape
    drafted: int
    verified: int
    accepted: int | tuple[int, ...]
    emitted: int | tuple[int, ...]
    draft_seconds: float
    verify_seconds: float
    step_seconds: float
    foreseen: int = 0

    @property
    def emitted_total(self) -> int:
        return self.emitted if isinstance(self.emitted, int) else sum(self.emitted)


@dataclass(slots=True)
class SpeculationReport:
    """All steps of one call. The first is the prefill: a plain step over the whole prompt.

    Attributes:
        steps: in order.
        batch_size: rows decoded together.
        answers: token ids that each row gained, in the order of the steps; padded behind a row's end.
    """

    batch_size: int = 1
    steps: list[StepRecord] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)

    @property
    def emitted(self) -> int:
        """Tokens added to the text, over all rows."""
        return sum(step.emitted_total for step in self.steps)

    @property
    def target_forwards(self) -> int:
        return len(self.steps)

    @property
    def tau(self) -> float:
        """Mean tokens that a row gained per target forward, plain steps and prefill included."""
        return self.emitted / (self.target_forwards * self.batch_size) if self.steps else 0.0

    @property
    def seconds(self) -> float:
        return sum(step.step_seconds for step in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens of all rows over all seconds, prefill included; 0 when the clock stood still."""
        return self.emitted / self.seconds if self.seconds > 0 else 0.0

    @property
    def mean_verified(self) -> float:
        """Mean nodes of a target forward, prefill left out."""
        decoding = self.steps[1:]
        return sum(step.verified for step in decoding) / len(decoding) if decoding else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values only: the summary and every step."""
        return {
            "batch_size": self.batch_size,
            "emitted": self.emitted,
            "target_forwards": self.target_forwards,
            "tau": self.tau,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "steps": [asdict(step) for step in self.steps],
        }
