"""What a policy decided over some texts, and what came of it: the data that `PolicyTrainer` learns from.

Tensor shapes: n decisions, a actions, F width of the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..replay import HeldOutcomes


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions in the order they were taken, text after text.

    Attributes:
        features: `[n, F]`.
        actions: `[n]`.
        log_probs: `[n]` of the actions, when they were taken.
        outcomes: `[n]` of the actions taken.
        ends: `[n]` bool, the last decision of a text.
        all_outcomes: `[n, a]` of every action, where known.
        oracle_seconds: the least that these texts could have taken, where known.
        dropped: decisions left out because the clock had jumped or stood still.
    """

    features: Tensor
    actions: Tensor
    log_probs: Tensor
    outcomes: HeldOutcomes
    ends: Tensor
    all_outcomes: HeldOutcomes | None = None
    oracle_seconds: float | None = None
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def tokens_per_second(self) -> float:
        return float(self.outcomes.emitted.sum() / self.outcomes.seconds.sum())

    @property
    def seconds_of_texts(self) -> Tensor:
        """`[texts]` fp64."""
        texts = torch.cat([torch.zeros(1, dtype=torch.long), self.ends.long().cumsum(0)])[:-1]
        return torch.zeros(int(self.ends.sum()), dtype=torch.float64).index_add(
            0, texts, self.outcomes.seconds.double()
        )

    @property
    def oracle_regret(self) -> float | None:
        """Time lost compared with the fastest sequence of shapes, as a share of the fastest time."""
        if self.oracle_seconds is None:
            return None
        return float(self.outcomes.seconds.sum()) / self.oracle_seconds - 1

    @classmethod
    def joined(cls, parts: "Sequence[Decisions]") -> "Decisions":
        """All decisions of `parts`, whose outcomes of other actions are unknown."""
        outcomes = [part.outcomes for part in parts]
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.actions for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            HeldOutcomes(*(torch.cat([getattr(part, f.name) for part in outcomes]) for f in fields(HeldOutcomes))),
            torch.cat([part.ends for part in parts]),
            dropped=sum(part.dropped for part in parts),
        )
