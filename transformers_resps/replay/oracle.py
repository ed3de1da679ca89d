"""The upper bound of any policy: the fastest sequence of shapes for recorded texts, by dynamic programming."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .outcomes import OutcomeTable


class Oracle:
    """Computes how long recorded texts take with one fixed action, and with the best action at every step.

    The step at position t with action a ends at t + emitted[t, a]; the least time from t to the text's end is the
    least over a of seconds[t, a] plus the least time from there.

    Args:
        table: outcomes of every action at every position.
    """

    def __init__(self, table: OutcomeTable) -> None:
        self.table = table

    @cached_property
    def _from_every_position(self) -> tuple[Tensor, Tensor]:
        """Seconds to the end `[p, a]` with one action throughout, and `[p]` with the best ones."""
        table = self.table
        actions = torch.arange(table.action_count)
        is_last = torch.zeros(len(table.features) + 1, dtype=torch.bool)
        is_last[table.stops] = True
        fixed = torch.zeros(len(table.features) + 1, table.action_count, dtype=torch.float64)
        best = torch.zeros(len(table.features) + 1, dtype=torch.float64)
        for place in reversed(range(len(table.features))):
            ends = place + table.emitted[place]
            done = is_last[ends]  # a step never passes its text's end, so an end that starts another text is one
            fixed[place] = table.seconds[place] + fixed[ends, actions].masked_fill(done, 0.0)
            best[place] = (table.seconds[place] + best[ends].masked_fill(done, 0.0)).min()
        return fixed[:-1], best[:-1]

    @property
    def fixed_seconds(self) -> Tensor:
        """`[texts, a]` seconds with one action throughout."""
        return self._from_every_position[0][self.table.starts]

    @property
    def best_seconds(self) -> Tensor:
        """`[texts]` seconds with the best action at every step."""
        return self._from_every_position[1][self.table.starts]

    @property
    def best_fixed(self) -> int:
        """The action that is fastest over all texts together."""
        return int(self.fixed_seconds.sum(0).argmin())

    @cached_property
    def best_fixed_rate(self) -> float:
        """Tokens per second of all texts with `best_fixed`."""
        headroom = self.headroom()
        return headroom.tokens / headroom.fixed_seconds

    def headroom(self, fixed: int | None = None) -> "Headroom":
        """Compare one fixed action, the best one per text, and the best one at every step.

        Args:
            fixed: the fixed action, for instance the best one of other texts; `None` for the best one of these.

        Returns:
            The seconds of each.
        """
        fixed = self.best_fixed if fixed is None else fixed
        return Headroom(
            tokens=int((self.table.stops - self.table.starts).sum()),
            fixed_seconds=float(self.fixed_seconds[:, fixed].sum()),
            per_text_seconds=float(self.fixed_seconds.min(-1).values.sum()),
            oracle_seconds=float(self.best_seconds.sum()),
        )


@dataclass(frozen=True, slots=True)
class Headroom:
    """Seconds that all texts together take, by how actions are chosen.

    Attributes:
        tokens: tokens of all texts, without the first of each, which prefill gives.
        fixed_seconds: with one action throughout.
        per_text_seconds: with the best fixed action of each text.
        oracle_seconds: with the best action at every step.
    """

    tokens: int
    fixed_seconds: float
    per_text_seconds: float
    oracle_seconds: float
