"""Tables of a step's tokens and seconds, for each tree shape and text position; and the fastest sequence of shapes.

Tensor shapes: t positions of a text, p positions of all texts, n decisions, a actions, F width of the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..policies.action_grid import ActionGrid


@dataclass(frozen=True, slots=True)
class TextOutcomes:
    """Tokens and seconds of a step with each action (tree shape) at each text position. Seconds must be positive."""

    features: Tensor  # [t, F] input of a policy before the step at each position
    emitted: Tensor  # [t, a] tokens that the step emits, at least 1 and at most the rest of the text
    seconds: Tensor  # [t, a] duration of the step
    grid: ActionGrid | None = None  # the shape of each action, if known

    def __post_init__(self) -> None:
        if not bool((self.seconds.isfinite() & (self.seconds > 0)).all()):
            raise ValueError(
                f"TextOutcomes got steps of {float(self.seconds.min())} to {float(self.seconds.max())} seconds, but a "
                "step takes a positive, finite time. Measure the costs again with `calibrate`."
            )


@dataclass(frozen=True, slots=True)
class HeldOutcomes:
    """Outcomes of n series of steps that keep one action (tree shape): `[n]`, or `[n, a]` with a column per action."""

    emitted: Tensor  # tokens of all these steps
    seconds: Tensor  # seconds of all these steps
    mean_rates: Tensor  # mean of the steps' tokens per second (Re-SpS, equation 5)

    def at(self, positions: Tensor | tuple[Tensor, Tensor]) -> "HeldOutcomes":
        return HeldOutcomes(self.emitted[positions], self.seconds[positions], self.mean_rates[positions])

    def of_actions(self, actions: Tensor) -> "HeldOutcomes":
        """Select, from outcomes `[n, a]` of all actions, the outcomes `[n]` of the chosen `actions` `[n]`."""
        return self.at((torch.arange(len(actions)), actions))


class OutcomeTable:
    """The outcomes of all positions of many recorded texts, one after another, to train and compare policies.

    The least time, with the best action (tree shape) at every step, is found by dynamic programming: a step at
    position t with action a ends at t + emitted[t, a], so the least time from t to the text's end is the minimum over
    a of seconds[t, a] plus the least time from t + emitted[t, a].
    """

    def __init__(self, texts: Sequence[TextOutcomes]) -> None:
        widths = {(text.features.shape[1], text.emitted.shape[1]) for text in texts}
        grids = {text.grid for text in texts}
        if len(widths) != 1 or len(grids) != 1:
            raise ValueError(
                f"Got {len(texts)} replayed texts of {len(grids)} grids, with these widths of features and numbers of "
                f"actions: {sorted(widths)}. Pass at least one text, all of one head and one grid."
            )
        lengths = torch.tensor([len(text.features) for text in texts])
        self.grid = grids.pop()
        self.features = torch.cat([text.features for text in texts]).cpu()  # [p, F]
        self.emitted = torch.cat([text.emitted for text in texts]).long().cpu()  # [p, a]
        self.seconds = torch.cat([text.seconds for text in texts]).double().cpu()  # [p, a]
        self.stops = lengths.cumsum(0)  # [texts] the position after each text
        self.starts = self.stops - lengths
        self._stop_of = self.stops.repeat_interleave(lengths)  # [p]
        self._held: dict[int, HeldOutcomes] = {}

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def action_count(self) -> int:
        return self.emitted.shape[1]

    def held(self, persistence: int) -> HeldOutcomes:
        """Compute the outcomes `[p, a]` of keeping each action for `persistence` steps, or to the text's end."""
        if persistence in self._held:
            return self._held[persistence]
        positions = torch.arange(len(self.features))[:, None].expand_as(self.emitted).clone()
        stops = self._stop_of[:, None]
        emitted, seconds, rates, steps = (torch.zeros_like(self.seconds) for _ in range(4))
        for _ in range(persistence):
            alive = positions < stops
            if not bool(alive.any()):
                break
            index = positions.clamp(max=len(self.features) - 1)
            gained = self.emitted.gather(0, index) * alive
            taken = self.seconds.gather(0, index)
            emitted += gained
            seconds += taken * alive
            rates += gained / taken
            steps += alive
            positions += gained
        self._held[persistence] = HeldOutcomes(emitted, seconds, rates / steps)
        return self._held[persistence]

    @cached_property
    def _seconds_to_end(self) -> tuple[Tensor, Tensor]:
        """Compute seconds to the text's end: `[p, a]` with one action throughout, `[p]` with the best at each step."""
        count = len(self.features)
        actions = torch.arange(self.action_count)
        is_stop = torch.zeros(count + 1, dtype=torch.bool)
        is_stop[self.stops] = True
        fixed = torch.zeros(count + 1, self.action_count, dtype=torch.float64)
        best = torch.zeros(count + 1, dtype=torch.float64)
        for position in reversed(range(count)):
            ends = position + self.emitted[position]
            done = is_stop[ends]  # the text ends there; the next text begins at the same position
            fixed[position] = self.seconds[position] + fixed[ends, actions].masked_fill(done, 0.0)
            best[position] = (self.seconds[position] + best[ends].masked_fill(done, 0.0)).min()
        return fixed[:-1], best[:-1]

    @property
    def fixed_seconds(self) -> Tensor:
        """Seconds `[texts, a]` to decode each text if every step uses the same action (tree shape)."""
        return self._seconds_to_end[0][self.starts]

    @property
    def best_seconds(self) -> Tensor:
        """Least seconds `[texts]` to decode each text, with the best action (tree shape) at every step."""
        return self._seconds_to_end[1][self.starts]

    @property
    def best_fixed(self) -> int:
        return int(self.fixed_seconds.sum(0).argmin())

    @cached_property
    def best_fixed_rate(self) -> float:
        """Tokens per second over all texts if every step uses the shape `best_fixed`."""
        return len(self.features) / float(self.fixed_seconds[:, self.best_fixed].sum())
