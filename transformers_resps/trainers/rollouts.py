"""Where decisions to learn from come from; here on replayed texts, without a model and without a clock."""

from typing import Protocol

import torch
from torch import Tensor

from ..policy import ReSpSPolicy
from ..replay import Oracle, OutcomeTable
from .decisions import Decisions


class Rollouts(Protocol):
    """Where a trainer of policies gets its decisions from: `ReplayRollouts` or `LiveRollouts`."""

    def __len__(self) -> int:
        """How many texts there are to decide over."""
        ...

    @property
    def knows_all_outcomes(self) -> bool:
        """Whether decisions come with the outcome of every action."""
        ...

    def collect(
        self, policy: ReSpSPolicy, texts: int, persistence: int, generator: torch.Generator, *, greedy: bool = False
    ) -> Decisions:
        """Decide over some texts, chosen by `generator`.

        Args:
            policy: its network decides; its own persistence and sampling are not used.
            texts: how many; all if there are fewer.
            persistence: steps that a decision is held.
            generator: for all random numbers, on the CPU.
            greedy: take the likeliest action instead of drawing.

        Returns:
            The decisions and their outcomes, text after text.
        """
        ...


class ReplayRollouts:
    """Rollouts on recorded texts: no model runs, and the same seed gives the same decisions.

    Args:
        table: outcomes of every action at every position.
    """

    knows_all_outcomes = True

    def __init__(self, table: OutcomeTable) -> None:
        self.table = table
        self.oracle = Oracle(table)

    def __len__(self) -> int:
        return len(self.table)

    def collect(
        self, policy: ReSpSPolicy, texts: int, persistence: int, generator: torch.Generator, *, greedy: bool = False
    ) -> Decisions:
        chosen = torch.randperm(len(self.table), generator=generator)[:texts]
        return self.follow(policy, chosen, persistence, None if greedy else generator)

    @torch.no_grad()
    def follow(
        self,
        policy: ReSpSPolicy,
        texts: Tensor,
        persistence: int,
        generator: torch.Generator | None,
        *,
        temperature: float = 1.0,
    ) -> Decisions:
        """Decide over `texts` from their beginning to their end, all of them side by side.

        Args:
            policy: its network decides.
            texts: their indices.
            persistence: steps that a decision is held.
            generator: draws the actions; `None` takes the likeliest.
            temperature: divides the logits before a draw.

        Returns:
            The decisions and their outcomes, text after text.

        Raises:
            ValueError: the table was made with another grid or another head than the policy.
        """
        self._check(policy)
        held = self.table.held(persistence)
        places, stops = self.table.starts[texts], self.table.stops[texts]
        lanes = torch.arange(len(texts))
        taken: list[tuple[Tensor, ...]] = []
        while len(lanes):
            logits = policy.network.logits(self.table.features[places]).cpu()
            log_probs = (logits / temperature).log_softmax(-1)
            actions = logits.argmax(-1) if generator is None else _draw(log_probs, generator)
            ends_at = places + held.emitted[places, actions].long()
            alive = ends_at < stops
            taken.append((lanes, places, actions, log_probs.gather(1, actions[:, None]).squeeze(1), ~alive))
            places, stops, lanes = ends_at[alive], stops[alive], lanes[alive]
        order, places, actions, kept, ends = (torch.cat(parts) for parts in zip(*taken, strict=True))
        order = order.sort(stable=True).indices  # text after text; within a text the order is kept
        all_outcomes = held.at(places[order])
        return Decisions(
            self.table.features[places[order]],
            actions[order],
            kept[order],
            all_outcomes.of(actions[order]),
            ends[order],
            all_outcomes,
            float(self.oracle.best_seconds[texts].sum()),
        )

    def _check(self, policy: ReSpSPolicy) -> None:
        given = (self.table.features.shape[1], self.table.action_count)
        needed = (policy.config.feature_size, len(policy.config.grid))
        if given != needed:
            raise ValueError(
                f"The replayed texts have features of width {given[0]} and {given[1]} actions, but the policy reads "
                f"width {needed[0]} and has {needed[1]} actions. Record the texts with the policy's own head, and "
                "make their outcomes for `policy.config.grid`."
            )
        policy.check_identity(grid=self.table.grid)


def _draw(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """One action per row of `[n, a]`."""
    return torch.multinomial(log_probs.exp(), 1, generator=generator).squeeze(1)
