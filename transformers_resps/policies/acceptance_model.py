"""`AcceptanceModel` turns a head's scores into the probability that the target accepts each drafted node.

A head is over- or underconfident, and more so on texts unlike its training data. Two corrections apply to each level:
Platt scaling, fitted on recorded texts, and a factor that is learned while decoding. Deep levels have few outcomes, so
their factor starts at the factor of the level above. Block heads guess all positions of a draft independently, so
their error grows with depth. Sums use Python floats, because a single tensor operation would take longer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


LEVELS = 4  # Number of levels with their own fitted scaling (block heads may have more); deeper levels use the last.
_MEMORY, _HIT_MEMORY = 0.99, 0.97  # Factors by which old sums are multiplied when an outcome is added.
_PRIOR_WEIGHT, _HIT_PRIOR_WEIGHT = 4.0, 2.0  # Number of observed outcomes that each prior is worth.
_ENOUGH = 4.0  # Number of observed drafts that make the model confident.
_PRIOR_HITS = 0.6  # Prior probability that the children of a right token include the next right token.
_MAX_EXPONENT = 700.0  # `math.exp` overflows just above.
MIN_SCORE = -7.0  # Nodes of a lower log probability (-7: one in a thousand) get probability 0, to save time.
MAX_SCORE = -1e-4  # Maximum of log probabilities, because the log odds of probability 1 are infinite.
_FIRST_CHILD, _FIRST_CHILD_SLOPE, _LATER_CHILDREN = 0.5, 0.43, (0.16, 0.075)  # See `children_of`.


@dataclass(frozen=True, slots=True)
class PlattScaling:
    """Corrects a path's probability p to `sigmoid(intercept + slope * logit(p))` (Platt 1999; arXiv 1706.04599)."""

    intercept: float = 0.0
    slope: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self.intercept == 0.0 and self.slope == 1.0

    def __call__(self, score: float) -> float:
        """Convert a path's log probability to its probability of acceptance."""
        score = min(score, MAX_SCORE)
        logit = score - math.log1p(-math.exp(score))
        exponent = -self.intercept - self.slope * logit
        return 1.0 / (1.0 + math.exp(min(exponent, _MAX_EXPONENT)))


class AcceptanceModel:
    """Estimates acceptance probabilities from scores. `scalings[0]` is for level 1; deeper levels use the last one."""

    def __init__(self, scalings: Sequence[PlattScaling] = (PlattScaling(),) * LEVELS) -> None:
        self.scalings = tuple(scalings)
        if not self.scalings:
            raise ValueError(
                "`AcceptanceModel` got no scalings, but needs one of the first level at least. Pass "
                "`[PlattScaling()]`, the identity."
            )
        self._factors = _Ratios(_MEMORY, _PRIOR_WEIGHT, 1.0)  # observed hits over predicted hits
        self._hits = _Ratios(_HIT_MEMORY, _HIT_PRIOR_WEIGHT, _PRIOR_HITS)
        is_fitted = not all(one.is_identity for one in self.scalings)
        self._drafts = _ENOUGH if is_fitted else 0.0  # decayed number of observed drafts

    @property
    def is_confident(self) -> bool:
        """Whether enough outcomes were observed: while decoding, or when the scalings were fitted."""
        return self._drafts >= _ENOUGH

    def probabilities(self, scores: Sequence[float], level: int) -> list[float]:
        """Convert the head's log probabilities of paths of `level` nodes to probabilities of acceptance."""
        calibrated, factor = self.scalings[min(level, len(self.scalings)) - 1], self._factors.product(level)
        exp = math.exp if calibrated.is_identity else calibrated
        return [min(factor * exp(score), 1.0) if score > MIN_SCORE else 0.0 for score in scores]

    def discounts(self, depth: int) -> list[float]:
        """Return, per level, the number to add to its nodes' scores. It never rises, so parents still rank first."""
        return list(accumulate((math.log(max(self._factors.product(level + 1), 1e-9)) for level in range(depth)), min))

    def hit_rate(self, level: int) -> float:
        """Estimate the probability that a level includes the right token, given that the level above it does."""
        return self._hits.at(level)

    def reach(self, depth: int) -> list[float]:
        """Estimate, before drafting, the probability that each of the first `depth` levels includes the right path."""
        return [self._hits.product(level) for level in range(1, depth + 1)]

    def children_of(self, probs: Sequence[float], level: int, width: int) -> list[float]:
        """Estimate the next level's probabilities, `width` children per node, from the `probs` of a level's nodes.

        At most three children of a node count. In recordings of two heads, an accepted child was its parent's best
        child in 50 to 90% of cases (more after a likely path), the second best in 16%, the third best in 7.5%.
        """
        all_children, root = self.hit_rate(level + 1), 1.0 / level
        second, third = (all_children * share for share in _LATER_CHILDREN)
        children: list[float] = []
        for node in probs:
            first = all_children * (_FIRST_CHILD + _FIRST_CHILD_SLOPE * node**root)
            children += (node * first, node * second, node * third)[:width]
        return children

    def learn(self, level_probs: Sequence[float], drafted_match: int, emitted: int) -> None:
        """Update all estimates from a draft whose first `drafted_match` levels included the right path.

        Levels deeper than the `emitted` tokens of the step are ignored: their right token is unknown. `level_probs`
        has, for each level, the sum of its `probabilities`: the estimate that the level includes the right path.
        """
        self._drafts = self._drafts * _HIT_MEMORY + 1.0
        above = 1.0
        for level, prob in enumerate(level_probs, start=1):
            if level > emitted or drafted_match < level - 1:
                return
            right = float(drafted_match >= level)
            expected = min(prob / above, 1.0) if above > 0 else 0.0
            claimed = expected / max(self._factors.at(level), 1e-3)  # the head's own estimate, without our factor
            self._factors.add(level, right, min(max(claimed, 0.01), 1.0))
            self._hits.add(level, right, 1.0)
            above = prob


class _Ratios:
    """Keeps two decaying sums per level and their ratio; a new level begins with the ratio of the level above it."""

    def __init__(self, memory: float, weight: float, first: float) -> None:
        self._memory, self._weight = memory, weight
        self._sums = [(weight * first, weight)]  # sums of levels 1, 2, ..., down to the deepest with an outcome
        self._products = [1.0, first]  # products of the first 0, 1, ... ratios

    def at(self, level: int) -> float:
        part, whole = self._sums[min(level, len(self._sums)) - 1]
        return part / whole

    def product(self, level: int) -> float:
        known = min(level, len(self._sums))
        return self._products[known] * self.at(level) ** (level - known)

    def add(self, level: int, part: float, whole: float) -> None:
        """Add `part` and `whole` to a level's two sums; all levels above it must already have an outcome."""
        if level > len(self._sums):
            self._sums.append((self._weight * self.at(level), self._weight))
        parts, wholes = self._sums[level - 1]
        self._sums[level - 1] = parts * self._memory + part, wholes * self._memory + whole
        self._products = [1.0, *accumulate((parts / wholes for parts, wholes in self._sums), mul)]
