"""How likely a drafted node is to be accepted: the head's own scores, calibrated.

A head is too sure of itself, and more so on another domain. Two corrections: a logistic map per level, fitted offline
on recorded texts, and a factor per level that follows the outcomes while decoding.

Knows numbers only. Plain floats: the trees are so small that a tensor operation costs more than the sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


LEVELS = 4  # deeper levels share the last one's numbers
_MEMORY = 0.97  # how much of the past an outcome leaves standing
_PRIOR_WEIGHT = 2.0  # outcomes that the fit is worth
_PRIOR_HITS = 0.6  # share of levels that are hit below a hit, before any was seen
_LEAST_SCORE = -10.0


@dataclass(frozen=True, slots=True)
class LogisticMap:
    """`sigmoid(intercept + slope * logit(path probability))`; the head's own word by default."""

    intercept: float = 0.0
    slope: float = 1.0

    def __call__(self, score: float) -> float:
        """Log probability of a path -> probability of its acceptance."""
        score = min(score, -1e-4)
        logit = score - math.log1p(-math.exp(score))
        return 1.0 / (1.0 + math.exp(-self.intercept - self.slope * logit))


class NodeOdds:
    """Probabilities of acceptance by score and level.

    Args:
        maps: one for each of the first `LEVELS` levels.
    """

    def __init__(self, maps: Sequence[LogisticMap] = (LogisticMap(),) * LEVELS) -> None:
        self.maps = tuple(maps)
        self._right = [_PRIOR_WEIGHT] * LEVELS  # decayed sums of outcomes and of what was expected of them
        self._expected = [_PRIOR_WEIGHT] * LEVELS
        self._hits = [_PRIOR_HITS * _PRIOR_WEIGHT] * LEVELS
        self._seen = [_PRIOR_WEIGHT] * LEVELS
        self.evidence = 0.0  # decayed number of drafts whose outcome was seen

    def of(self, scores: Sequence[float], level: int) -> list[float]:
        """Probability that each path of `level` nodes is accepted, from its log probability under the head."""
        index = min(level, LEVELS) - 1
        calibrated, factor = self.maps[index], 1.0
        for place in range(index + 1):
            factor *= self._right[place] / self._expected[place]
        # A node of less than one in 20,000 is worth no arithmetic
        return [min(factor * calibrated(score), 1.0) if score > _LEAST_SCORE else 0.0 for score in scores]

    def hit_rate(self, level: int) -> float:
        """Probability that the right token is among the children of a right path, at `level`."""
        index = min(level, LEVELS) - 1
        return self._hits[index] / self._seen[index]

    def learn(self, masses: Sequence[float], foreseen: int, emitted: int) -> None:
        """Take in one draft's outcome.

        Args:
            masses: the sum of `of` over each level of the pool: the probability that the level holds the right path.
            foreseen: levels that held it.
            emitted: tokens of the step; what follows them was not seen.
        """
        self.evidence = self.evidence * _MEMORY + 1.0
        above = 1.0
        for level, mass in enumerate(masses, start=1):
            if level > emitted or foreseen < level - 1:
                return
            index, right = min(level, LEVELS) - 1, float(foreseen >= level)
            expected = min(mass / above, 1.0) if above > 0 else 0.0
            claimed = expected * self._expected[index] / max(self._right[index], 1e-3)  # without the factor itself
            self._right[index] = self._right[index] * _MEMORY + right
            self._expected[index] = self._expected[index] * _MEMORY + min(max(claimed, 0.01), 1.0)
            self._hits[index] = self._hits[index] * _MEMORY + right
            self._seen[index] = self._seen[index] * _MEMORY + 1.0
            above = mass
