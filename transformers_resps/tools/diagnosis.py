"""Compare how well a head agrees with its target under several "readings": interpretations of its checkpoint."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..drafting import FileReading


_SURE = 3.0  # standard errors; a larger difference is sure. A limit of 2 could pick one of twenty by chance
_MIN_GAIN = 0.01  # accepted tokens per chain; a smaller gain is not worth other settings
_MIN_NATS = 0.02  # nats per chain; a smaller gain is not worth other settings
_HOPELESS = 5.0  # standard errors; an interpretation that is worse by more than this is dropped
_MUCH = 0.05  # no verdict while another interpretation might gain more than this share of a step's tokens
_FEW_ANSWERS = 10  # fewer answers give no verdict
_DROPPING_ANSWERS = 8  # with fewer answers no interpretation is dropped
_SETTLING_ANSWERS = 20  # fewer answers do not end the diagnosis, since chance often decides
_STRANGER = 0.05  # agreement at depth 1; with less, the head was not made for this target


@dataclass(frozen=True, slots=True)
class Tally:
    """The scores of one answer under one interpretation of the checkpoint, summed over the answer's positions."""

    positions: int  # number of positions at which a chain of tokens was drafted
    kept: int  # drafted tokens that the target accepts
    log_prob: float  # the head's log probability of the target's tokens, summed over depths, in nats


@dataclass(frozen=True, slots=True)
class ReadingScore:
    """How well a head agrees with its target under one interpretation of its checkpoint."""

    reading: FileReading
    agreement: tuple[float, ...]  # per depth: share of positions at which head and target pick the same token
    tallies: tuple[Tally, ...]  # one for each answer

    @property
    def positions(self) -> int:
        return sum(tally.positions for tally in self.tallies)

    @property
    def accepted(self) -> float:
        """Mean number of accepted tokens of a chain; a chain has as many tokens as `agreement` has depths."""
        return sum(tally.kept for tally in self.tallies) / self.positions

    @property
    def log_prob(self) -> float:
        """Mean log probability that the head gives a token of the target, in nats."""
        return sum(tally.log_prob for tally in self.tallies) / self.positions / len(self.agreement)


@dataclass(frozen=True)
class Diagnosis:
    """The scores of all interpretations of a checkpoint ("readings"), and which one is best.

    An interpretation is better if the target accepts significantly more drafted tokens, or about as many and the head
    gives the target's tokens more probability, which a wrong RoPE base lowers before it costs many accepted tokens.
    """

    scores: tuple[ReadingScore, ...]  # the configured interpretation is first

    @property
    def configured(self) -> ReadingScore:
        return self.scores[0]

    @cached_property
    def best(self) -> ReadingScore:
        """The best interpretation; of equally good ones, the one that changes the fewest settings of the config."""
        best = self.configured
        for score in sorted(self.scores, key=lambda score: (score.accepted, score.log_prob)):
            if self._is_better(score, best):
                best = score
        equal = [score for score in self.scores if not self._is_better(best, score)]
        return min(equal, key=lambda score: (len(self._changes(score)), -score.log_prob))

    def _is_better(self, score: ReadingScore, other: ReadingScore) -> bool:
        gain, error = self.gain(score, other)
        if abs(gain) > max(_SURE * error, _MIN_GAIN):
            return gain > 0
        likelier, doubt = self._mean_difference("log_prob", score, other)
        return gain >= -error and likelier > max(_SURE * doubt, _MIN_NATS)

    def _might_be_better(self, score: ReadingScore, other: ReadingScore) -> bool:
        """Whether more answers might still show that `score` is better than `other`."""
        gain, error = self.gain(score, other)
        likelier, doubt = self._mean_difference("log_prob", score, other)
        most = gain + _SURE * error
        return most > _MIN_GAIN or (most >= 0 and likelier + _SURE * doubt > _MIN_NATS)

    @cached_property
    def possible_gain(self) -> float:
        """Upper limit (mean plus 3 standard errors) of any other interpretation's `gain` over the best one."""
        gains = (self.gain(score, self.best) for score in self.scores if score is not self.best)
        return max((gain + _SURE * error for gain, error in gains), default=0.0)

    @property
    def answers(self) -> int:
        return len(self.configured.tallies)

    @property
    def is_settled(self) -> bool:
        """Whether more answers would hardly change which interpretation is best."""
        others = (score for score in self.scores if score is not self.best)
        enough = self.answers >= _SETTLING_ANSWERS
        return enough and not any(self._might_be_better(score, self.best) for score in others)

    @property
    def has_evidence(self) -> bool:
        """Whether the answers suffice for a verdict: no other interpretation could be much better than the best."""
        return self.answers >= _FEW_ANSWERS and self.possible_gain <= _MUCH * (1 + self.best.accepted)

    @property
    def worth_following(self) -> tuple[FileReading, ...]:
        """The interpretations to test further: the configured one and all close to the best; with few answers, all."""
        if self.answers < _DROPPING_ANSWERS:
            return tuple(score.reading for score in self.scores)
        kept = [self.configured]
        for score in self.scores[1:]:
            gain, error = self.gain(score, self.best)
            nats, doubt = self._mean_difference("log_prob", score, self.best)
            if score is self.best or gain >= -_HOPELESS * error or nats >= -_HOPELESS * doubt:
                kept.append(score)
        return tuple(score.reading for score in kept)

    def _changes(self, score: ReadingScore) -> dict[str, Any]:
        """The settings in which an interpretation differs from the configured one, as JSON values."""
        configured, own = asdict(self.configured.reading), asdict(score.reading)
        changes = {name: value for name, value in own.items() if value != configured[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}

    def gain(self, score: ReadingScore, over: ReadingScore | None = None) -> tuple[float, float]:
        """Return the gain of `score` over `over` (or `configured`) in accepted tokens per chain, and its error."""
        return self._mean_difference("kept", score, over or self.configured)

    def _mean_difference(self, field: str, score: ReadingScore, other: ReadingScore) -> tuple[float, float]:
        """Return the mean per position of `field` in `score` minus that in `other`, and its standard error."""
        pairs = zip(score.tallies, other.tallies, strict=True)
        differences = [getattr(own, field) - getattr(others, field) for own, others in pairs]
        answers, mean = len(differences), sum(differences) / score.positions
        spread = sum((d - mean * t.positions) ** 2 for d, t in zip(differences, score.tallies, strict=True))
        return mean, math.sqrt(spread * answers / (answers - 1)) / score.positions

    @property
    def is_healthy(self) -> bool:
        """Whether no other interpretation is significantly better than the configured one."""
        return self.best is self.configured

    @property
    def overrides(self) -> dict[str, Any]:
        """Keywords for `from_pretrained` that select the best interpretation; empty if it is the configured one."""
        return self._changes(self.best)

    @property
    def verdict(self) -> str:
        """The result in one or two sentences; if there is too little evidence, they say so."""
        accepted = f"{self.configured.accepted:.2f} of {len(self.configured.agreement)} drafted tokens accepted"
        passed = ", ".join(f"{key}={value!r}" for key, value in self.overrides.items())
        so_far = f"{accepted} as configured, and no other settings are surely better"
        if not self.is_healthy:
            gain, error = self.gain(self.best)
            so_far = f"{accepted} as configured, {self.best.accepted:.2f} with `{passed}`"
            finding = (
                f"The head is read wrongly: {so_far} (gain {gain:.2f} +- {error:.2f}; "
                f"{self.best.log_prob - self.configured.log_prob:+.3f} nats per token). Pass "
                f"`{self.best.reading.loader}.from_pretrained(..., {passed})`."
            )
        elif self.configured.agreement[0] < _STRANGER:
            finding = (
                f"No settings make this head agree with this target ({accepted}). It was trained for another target, "
                "or too little."
            )
        else:
            finding = f"The head is read as it was trained: {accepted}, and no other settings are better."
        if self.has_evidence:
            return finding
        doubt = f"other settings might accept {self.possible_gain:.2f} tokens more"
        if self.answers < _FEW_ANSWERS:
            doubt = f"{self.answers} answers of {self.configured.positions} positions"
        elif not self.is_healthy:
            return f"{finding} With more answers, {doubt}."
        return f"Too little evidence: {doubt}. So far {so_far}. Read more answers."
