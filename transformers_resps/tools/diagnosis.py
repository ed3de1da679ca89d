"""Compares how well a head agrees with its target under each reading, and says which reading is right."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..drafting import Reading


_SURE = 3.0  # standard errors; more than two because the best of some twenty readings is compared
_MIN_GAIN = 0.01  # accepted tokens per chain: less is not worth another file
_MIN_NATS = 0.02  # per chain, likewise
_HOPELESS = 5.0  # standard errors: a reading that is worse by more is dropped
_MUCH = 0.05  # share of a step's tokens: no verdict while another reading might add more
_FEW_ANSWERS = 10  # no verdict from fewer
_DROPPING_ANSWERS = 8  # no reading is dropped after fewer
_SETTLING_ANSWERS = 20  # the diagnosis does not end before: early answers decide by chance more often
_STRANGER = 0.05  # agreement at depth 1 below which a head was not made for its target


@dataclass(frozen=True, slots=True)
class Tally:
    """One answer under one reading, as sums over its positions."""

    positions: int  # where a chain was drafted
    kept: int  # tokens of the chains that the target accepts
    log_prob: float  # nats that the head gave the target's own tokens, at all depths


@dataclass(frozen=True, slots=True)
class Cell:
    """How well the head agrees with its target under one reading."""

    reading: Reading
    agreement: tuple[float, ...]  # per depth: share of positions where the head's likeliest token is the target's
    tallies: tuple[Tally, ...]  # of each answer

    @property
    def positions(self) -> int:
        return sum(tally.positions for tally in self.tallies)

    @property
    def accepted(self) -> float:
        """Drafted tokens per position that the target accepts of a chain as long as `agreement`."""
        return sum(tally.kept for tally in self.tallies) / self.positions

    @property
    def log_prob(self) -> float:
        """Nats per token of the target."""
        return sum(tally.log_prob for tally in self.tallies) / self.positions / len(self.agreement)


@dataclass(frozen=True)
class Diagnosis:
    """How well the head agrees under every reading, and the verdict.

    A reading is better if its chains keep more tokens beyond noise. If they keep no fewer, it is better if it gives
    the target's tokens a higher likelihood beyond noise: this shows a wrong RoPE base before it costs many tokens.
    """

    cells: tuple[Cell, ...]  # the configured one first

    @property
    def configured(self) -> Cell:
        return self.cells[0]

    @cached_property
    def best(self) -> Cell:
        """The best reading; of those that differ from it by noise only, the one nearest to the configured."""
        best = self.configured
        for cell in sorted(self.cells, key=lambda cell: (cell.accepted, cell.log_prob)):
            if self._is_better(cell, best):
                best = cell
        equal = [cell for cell in self.cells if not self._is_better(best, cell)]
        return min(equal, key=lambda cell: (len(self._changes(cell)), -cell.log_prob))

    def _is_better(self, cell: Cell, other: Cell) -> bool:
        gain, error = self.gain(cell, other)
        if abs(gain) > max(_SURE * error, _MIN_GAIN):
            return gain > 0
        likelier, doubt = self._likelier(cell, other)
        return gain >= -error and likelier > max(_SURE * doubt, _MIN_NATS)

    def _might_be_better(self, cell: Cell, other: Cell) -> bool:
        """Whether more answers might still show that a reading is better."""
        gain, error = self.gain(cell, other)
        likelier, doubt = self._likelier(cell, other)
        most = gain + _SURE * error
        return most > _MIN_GAIN or (most >= 0 and likelier + _SURE * doubt > _MIN_NATS)

    @cached_property
    def possible_gain(self) -> float:
        """Tokens per position that another reading than the best might accept more: the upper end of its interval."""
        gains = (self.gain(cell, self.best) for cell in self.cells if cell is not self.best)
        return max((gain + _SURE * error for gain, error in gains), default=0.0)

    @property
    def answers(self) -> int:
        return len(self.configured.tallies)

    @property
    def is_settled(self) -> bool:
        """Whether more answers would hardly change the best reading."""
        others = (cell for cell in self.cells if cell is not self.best)
        enough = self.answers >= _SETTLING_ANSWERS
        return enough and not any(self._might_be_better(cell, self.best) for cell in others)

    @property
    def has_evidence(self) -> bool:
        """Whether the answers are enough for a verdict: no other reading might be much better than the best."""
        return self.answers >= _FEW_ANSWERS and self.possible_gain <= _MUCH * (1 + self.best.accepted)

    @property
    def worth_following(self) -> tuple[Reading, ...]:
        """The configured reading and all that are not far worse than the best; all while there are few answers."""
        if self.answers < _DROPPING_ANSWERS:
            return tuple(cell.reading for cell in self.cells)
        kept = [self.configured]
        for cell in self.cells[1:]:
            gain, error = self.gain(cell, self.best)
            nats, doubt = self._likelier(cell, self.best)
            if cell is self.best or gain >= -_HOPELESS * error or nats >= -_HOPELESS * doubt:
                kept.append(cell)
        return tuple(cell.reading for cell in kept)

    def _changes(self, cell: Cell) -> dict[str, Any]:
        configured = asdict(self.configured.reading)
        return {name: value for name, value in asdict(cell.reading).items() if value != configured[name]}

    def gain(self, cell: Cell, over: Cell | None = None) -> tuple[float, float]:
        """Return the tokens accepted per position above another cell (the configured one), and their error."""
        other = over or self.configured
        return self._mean([a.kept - b.kept for a, b in zip(cell.tallies, other.tallies, strict=True)], cell)

    def _likelier(self, cell: Cell, other: Cell) -> tuple[float, float]:
        nats = [a.log_prob - b.log_prob for a, b in zip(cell.tallies, other.tallies, strict=True)]
        return self._mean(nats, cell)

    def _mean(self, differences: list[float] | list[int], cell: Cell) -> tuple[float, float]:
        """Return the mean per position of differences summed per answer, and its standard error over answers."""
        answers, mean = len(differences), sum(differences) / cell.positions
        spread = sum((d - mean * t.positions) ** 2 for d, t in zip(differences, cell.tallies, strict=True))
        return mean, math.sqrt(spread * answers / (answers - 1)) / cell.positions

    @property
    def is_healthy(self) -> bool:
        """Whether no other reading is better beyond noise."""
        return self.best is self.configured

    @property
    def overrides(self) -> dict[str, Any]:
        """What to pass to `from_pretrained` of the reading's `loader`; empty when healthy."""
        changes = self._changes(self.best)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}

    @property
    def _passed(self) -> str:
        """The overrides as keywords."""
        return ", ".join(f"{key}={value!r}" for key, value in self.overrides.items())

    @property
    def verdict(self) -> str:
        """The result in one or two sentences; with too little evidence there is a doubt, and no finding."""
        accepted = f"{self.configured.accepted:.2f} of {len(self.configured.agreement)} drafted tokens accepted"
        finding = self._finding(accepted)
        if self.has_evidence:
            return finding
        doubt = f"other settings might accept {self.possible_gain:.2f} tokens more"
        if self.answers < _FEW_ANSWERS:
            doubt = f"{self.answers} answers of {self.configured.positions} positions"
        elif not self.is_healthy:
            return f"{finding} With more answers, {doubt}."
        if self.is_healthy:
            so_far = f"{accepted} as configured, and no other settings are surely better"
        else:
            so_far = f"{accepted} as configured, {self.best.accepted:.2f} with `{self._passed}`"
        return f"Too little evidence: {doubt}. So far {so_far}. Read more answers."

    def _finding(self, configured: str) -> str:
        if not self.is_healthy:
            passed = self._passed
            gain, error = self.gain(self.best)
            return (
                f"The head is read wrongly: {configured} as configured, {self.best.accepted:.2f} with `{passed}` "
                f"(gain {gain:.2f} +- {error:.2f}; {self.best.log_prob - self.configured.log_prob:+.3f} nats per "
                f"token). Pass `{self.best.reading.loader}.from_pretrained(..., {passed})`."
            )
        if self.configured.agreement[0] < _STRANGER:
            return (
                f"No settings make this head agree with this target ({configured}). It was trained for another "
                "target, or too little."
            )
        return f"The head is read as it was trained: {configured}, and no other settings are better."
