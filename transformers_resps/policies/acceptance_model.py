"""Probability that a drafted node is accepted: the head's scores, calibrated.

A head is over- or underconfident, and more so on another domain. There are two corrections: Platt scaling per level,
fitted offline on recorded sequences, and one factor, applied once per level, that follows the outcomes while decoding.
A separate factor for each level would rest on too few outcomes.

Plain floats: the trees are so small that a tensor operation costs more than the sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


LEVELS = 4  # deeper levels share the last one's numbers
_MEMORY, _HIT_MEMORY = 0.99, 0.97  # weight of the past when an outcome is added
_PRIOR_WEIGHT, _HIT_PRIOR_WEIGHT = 4.0, 2.0  # the fit counts like so many outcomes
_ENOUGH = 4.0  # drafts after which the estimates count as evidence
_PRIOR_HITS = 0.6  # share of levels that are hit below a hit, before any was seen
_MAX_EXPONENT = 700.0  # `math.exp` overflows just above
MIN_SCORE = -7.0  # a node of less than one in a thousand is worth no arithmetic
MAX_SCORE = -1e-4  # the log odds of a certain node are infinite
_FIRST_CHILD, _FIRST_CHILD_SLOPE, _LATER_CHILDREN = 0.5, 0.43, (0.16, 0.075)  # see `children_of`


@dataclass(frozen=True, slots=True)
class PlattScaling:
    """`sigmoid(intercept + slope * logit(path probability))`; the identity by default.

    Source: Platt 1999; for networks Guo et al. 2017 (arXiv 1706.04599).
    """

    intercept: float = 0.0
    slope: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self.intercept == 0.0 and self.slope == 1.0

    def __call__(self, score: float) -> float:
        """Log probability of a path -> probability of its acceptance."""
        score = min(score, MAX_SCORE)
        logit = score - math.log1p(-math.exp(score))
        exponent = -self.intercept - self.slope * logit
        return 1.0 / (1.0 + math.exp(min(exponent, _MAX_EXPONENT)))


class AcceptanceModel:
    """Probabilities of acceptance by score and level, with a scaling for each of the first `LEVELS` levels."""

    def __init__(self, scalings: Sequence[PlattScaling] = (PlattScaling(),) * LEVELS) -> None:
        self.scalings = tuple(scalings)
        if len(self.scalings) != LEVELS:
            raise ValueError(
                f"`AcceptanceModel` needs one scaling for each of {LEVELS} levels, got {len(self.scalings)}. Fill up "
                "with `PlattScaling()`, the identity."
            )
        self._right = _PRIOR_WEIGHT  # decayed sums of outcomes and of what was expected of them
        self._expected = _PRIOR_WEIGHT
        self._hits = [_PRIOR_HITS * _HIT_PRIOR_WEIGHT] * LEVELS
        self._seen = [_HIT_PRIOR_WEIGHT] * LEVELS
        is_fitted = not all(one.is_identity for one in self.scalings)
        self._drafts = _ENOUGH if is_fitted else 0.0  # decayed number of drafts whose outcome was seen

    @property
    def is_confident(self) -> bool:
        """Whether enough outcomes were seen, here or when the scalings were fitted."""
        return self._drafts >= _ENOUGH

    def probabilities(self, scores: Sequence[float], level: int) -> list[float]:
        """Probability that each path of `level` nodes is accepted, from its log probability under the head."""
        index = min(level, LEVELS)
        calibrated, factor = self.scalings[index - 1], (self._right / self._expected) ** index
        exp = math.exp if calibrated.is_identity else calibrated
        return [min(factor * exp(score), 1.0) if score > MIN_SCORE else 0.0 for score in scores]

    def hit_rate(self, level: int) -> float:
        """Probability that the right token is among the children of a right path, at `level`."""
        index = min(level, LEVELS) - 1
        return self._hits[index] / self._seen[index]

    def reach(self, depth: int) -> list[float]:
        """Probability that each of the first `depth` levels holds the right path, before anything is drafted."""
        return list(accumulate((self.hit_rate(level) for level in range(1, depth + 1)), mul))

    def children_of(self, probs: Sequence[float], level: int, width: int) -> list[float]:
        """Probabilities of the children that nodes of a level would get, before they are drafted; three at most count.

        The head stays about as confident as it was. On recordings of two heads the first child holds half to nine
        tenths of what all children hit, rising with the mean probability of a node on the way to it; the next two
        0.16 and 0.075.
        """
        all_children, root = self.hit_rate(level + 1), 1.0 / level
        second, third = (all_children * share for share in _LATER_CHILDREN)
        children: list[float] = []
        for node in probs:
            first = all_children * (_FIRST_CHILD + _FIRST_CHILD_SLOPE * node**root)
            children += (node * first, node * second, node * third)[:width]
        return children

    def learn(self, level_probs: Sequence[float], drafted_match: int, emitted: int) -> None:
        """Take in that `drafted_match` levels of a draft held the right path; after `emitted` tokens it was not seen.

        `level_probs` are the sums of `probabilities` over each level of the pool: how likely it holds the right path.
        """
        self._drafts = self._drafts * _HIT_MEMORY + 1.0
        above = 1.0
        for level, prob in enumerate(level_probs, start=1):
            if level > emitted or drafted_match < level - 1:
                return
            index, right = min(level, LEVELS) - 1, float(drafted_match >= level)
            expected = min(prob / above, 1.0) if above > 0 else 0.0
            claimed = expected * self._expected / max(self._right, 1e-3)  # without the factor itself
            self._right = self._right * _MEMORY + right
            self._expected = self._expected * _MEMORY + min(max(claimed, 0.01), 1.0)
            self._hits[index] = self._hits[index] * _HIT_MEMORY + right
            self._seen[index] = self._seen[index] * _HIT_MEMORY + 1.0
            above = prob
