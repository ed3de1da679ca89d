"""Outcomes of shapes: of every shape at every position of recorded texts, once or held for several steps.

Tensor shapes: t positions of a text, p of all texts, n decisions, a actions, F width of the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policy import ActionGrid


@dataclass(frozen=True, slots=True)
class TextOutcomes:
    """The outcome of every action at every position of one recorded text.

    Attributes:
        features: `[t, F]` what a policy sees before the step at that position.
        emitted: `[t, a]` tokens the step would have added, at least 1 and no more than the text still has.
        seconds: `[t, a]` seconds the step would have taken.
        grid: the shapes that the actions stand for; `None` if unknown.

    Raises:
        ValueError: the tensors do not fit together, or a value is impossible.
    """

    features: Tensor
    emitted: Tensor
    seconds: Tensor
    grid: ActionGrid | None = None

    def __post_init__(self) -> None:
        length = len(self.features)
        if not length or len(self.emitted) != length or self.seconds.shape != self.emitted.shape:
            raise ValueError(
                f"TextOutcomes got features {list(self.features.shape)}, emitted {list(self.emitted.shape)} and "
                f"seconds {list(self.seconds.shape)}, but they need the same number of positions, at least one, and "
                "the same actions. Build them with `ReplayText.outcomes`."
            )
        left = length - torch.arange(length, device=self.emitted.device)[:, None]
        if bool(((self.emitted < 1) | (self.emitted > left)).any()):
            raise ValueError(
                f"TextOutcomes got steps of {int(self.emitted.min())} to {int(self.emitted.max())} tokens in a text "
                f"of {length}, but a step adds at least 1 and ends with the text. Clip them to what is left."
            )
        if not bool((self.seconds.isfinite() & (self.seconds > 0)).all()):
            raise ValueError(
                f"TextOutcomes got steps of {float(self.seconds.min())} to {float(self.seconds.max())} seconds, but a "
                "step takes a positive, finite time. Measure the costs again with `calibrate`."
            )


@dataclass(frozen=True, slots=True)
class HeldOutcomes:
    """Outcomes of holding an action for some steps, or until the text ends.

    All three are `[n]` of the actions taken, or `[n, a]` of every action; `[p, a]` at every position of all texts.

    Attributes:
        emitted: tokens of all steps together.
        seconds: seconds of all steps together.
        mean_rates: mean over the steps of each step's tokens per second (Re-SpS, equation 5).
    """

    emitted: Tensor
    seconds: Tensor
    mean_rates: Tensor

    def at(self, places: Tensor) -> "HeldOutcomes":
        """Rows `places`."""
        return HeldOutcomes(self.emitted[places], self.seconds[places], self.mean_rates[places])

    def of(self, actions: Tensor) -> "HeldOutcomes":
        """From `[n, a]` of every action, `[n]` of `actions` `[n]`."""
        rows = torch.arange(len(actions))
        return HeldOutcomes(self.emitted[rows, actions], self.seconds[rows, actions], self.mean_rates[rows, actions])


class OutcomeTable:
    """The outcomes of many recorded texts, concatenated, to train or compare policies on.

    Args:
        texts: with the same actions and the same width of features.

    Raises:
        ValueError: there are no texts, or they differ in one of these.

    Attributes:
        features: `[p, F]`, p positions of all texts.
        emitted: `[p, a]` tokens.
        seconds: `[p, a]` fp64 seconds.
        starts: `[texts]` first position of each text.
        stops: `[texts]` position after the last of each text.
        grid: the shapes that the actions stand for; `None` if unknown.
    """

    def __init__(self, texts: Sequence[TextOutcomes]) -> None:
        kinds = {(text.features.shape[1], text.emitted.shape[1]) for text in texts}
        grids = {text.grid for text in texts}
        if len(kinds) != 1 or len(grids) != 1:
            raise ValueError(
                f"Got {len(texts)} replayed texts of {len(grids)} grids, with these widths of features and numbers of "
                f"actions: {sorted(kinds)}. Pass at least one text, all of one head and one grid."
            )
        lengths = torch.tensor([len(text.features) for text in texts])
        self.grid = grids.pop()
        self.features = torch.cat([text.features for text in texts]).cpu()
        self.emitted = torch.cat([text.emitted for text in texts]).long().cpu()
        self.seconds = torch.cat([text.seconds for text in texts]).double().cpu()
        self.stops = lengths.cumsum(0)
        self.starts = self.stops - lengths
        self._stop_of = self.stops.repeat_interleave(lengths)  # [p]
        self._held: dict[int, HeldOutcomes] = {}

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def action_count(self) -> int:
        return self.emitted.shape[1]

    def held(self, persistence: int) -> HeldOutcomes:
        """Outcomes `[p, a]` of holding each action for `persistence` steps from each position."""
        if persistence not in self._held:
            self._held[persistence] = self._hold(persistence)
        return self._held[persistence]

    def _hold(self, persistence: int) -> HeldOutcomes:
        places = torch.arange(len(self.features))[:, None].expand_as(self.emitted).clone()
        stops = self._stop_of[:, None]
        emitted, seconds, rates, steps = (torch.zeros_like(self.seconds) for _ in range(4))
        for _ in range(persistence):
            alive = places < stops
            if not bool(alive.any()):
                break
            index = places.clamp(max=len(self.features) - 1)
            gained = self.emitted.gather(0, index) * alive
            taken = self.seconds.gather(0, index)
            emitted += gained
            seconds += taken * alive
            rates += gained / taken
            steps += alive
            places += gained
        return HeldOutcomes(emitted, seconds, rates / steps)
