"""Probability that a drafted node is accepted: the head's scores, calibrated.

A head is over- or underconfident, and more so on another domain. There are two corrections: Platt scaling per level,
fitted offline on recorded sequences, and one factor per level that follows the outcomes while decoding. A deep level
has few outcomes, so its factor leans on that of the level above. Blocks need one each: their slots are guessed apart,
and what they claim together is further from the truth with every level.

Plain floats: the trees are so small that a tensor operation costs more than the sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


LEVELS = 4  # that a fit tells apart, unless a block fills more; deeper levels share the last one's scaling
_MEMORY, _HIT_MEMORY = 0.99, 0.97  # weight of the past when an outcome is added
_PRIOR_WEIGHT, _HIT_PRIOR_WEIGHT = 4.0, 2.0  # what is known beforehand counts like so many outcomes
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
    """Probabilities of acceptance by score and level, with scalings of the first levels; deeper ones have the last."""

    def __init__(self, scalings: Sequence[PlattScaling] = (PlattScaling(),) * LEVELS) -> None:
        self.scalings = tuple(scalings)
        if not self.scalings:
            raise ValueError(
                "`AcceptanceModel` got no scalings, but needs one of the first level at least. Pass "
                "`[PlattScaling()]`, the identity."
            )
        # Of each level that had an outcome
        self._factors = _Ratios(_MEMORY, _PRIOR_WEIGHT, 1.0)  # outcomes over what was expected of them
        self._hits = _Ratios(_HIT_MEMORY, _HIT_PRIOR_WEIGHT, _PRIOR_HITS)
        is_fitted = not all(one.is_identity for one in self.scalings)
        self._drafts = _ENOUGH if is_fitted else 0.0  # decayed number of drafts whose outcome was seen

    @property
    def is_confident(self) -> bool:
        """Whether enough outcomes were seen, here or when the scalings were fitted."""
        return self._drafts >= _ENOUGH

    def probabilities(self, scores: Sequence[float], level: int) -> list[float]:
        """Probability that each path of `level` nodes is accepted, from its log probability under the head."""
        calibrated, factor = self.scalings[min(level, len(self.scalings)) - 1], self._factors.product(level)
        exp = math.exp if calibrated.is_identity else calibrated
        return [min(factor * exp(score), 1.0) if score > MIN_SCORE else 0.0 for score in scores]

    def discounts(self, depth: int) -> list[float]:
        """Of each of the first `depth` levels, the log of what outcomes make of the scores; it never rises, so that a
        parent ranks before its children.
        """
        return list(accumulate((math.log(max(self._factors.product(level + 1), 1e-9)) for level in range(depth)), min))

    def hit_rate(self, level: int) -> float:
        """Probability that the right token is among the children of a right path, at `level`."""
        return self._hits.of(level)

    def reach(self, depth: int) -> list[float]:
        """Probability that each of the first `depth` levels holds the right path, before anything is drafted."""
        return [self._hits.product(level) for level in range(1, depth + 1)]

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
            right = float(drafted_match >= level)
            expected = min(prob / above, 1.0) if above > 0 else 0.0
            claimed = expected / max(self._factors.of(level), 1e-3)  # without the factor itself
            self._factors.add(level, right, min(max(claimed, 0.01), 1.0))
            self._hits.add(level, right, 1.0)
            above = prob


class _Ratios:
    """A ratio of decayed sums for each level. At its first outcome it is that of the level above, counted `weight`
    times.
    """

    def __init__(self, memory: float, weight: float, first: float) -> None:
        self._memory, self._weight = memory, weight
        self._sums = [(weight * first, weight)]  # of level 1, 2, ... as far as there were outcomes
        self._products = [1.0, first]  # of the first 0, 1, ... levels

    def of(self, level: int) -> float:
        """Deeper levels have the last."""
        part, whole = self._sums[min(level, len(self._sums)) - 1]
        return part / whole

    def product(self, level: int) -> float:
        """Of the first levels up to this one."""
        known = min(level, len(self._sums))
        return self._products[known] * self.of(level) ** (level - known)

    def add(self, level: int, part: float, whole: float) -> None:
        """Take in an outcome of a level; all above have had one."""
        if level > len(self._sums):
            self._sums.append((self._weight * self.of(level), self._weight))
        parts, wholes = self._sums[level - 1]
        self._sums[level - 1] = parts * self._memory + part, wholes * self._memory + whole
        self._products = [1.0, *accumulate((parts / wholes for parts, wholes in self._sums), mul)]
