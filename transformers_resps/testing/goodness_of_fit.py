"""Test whether tokens were drawn from given distributions, by chi-square.

There is one token per place, and every place has a distribution of its own, given what was written before it. Tokens
fall into bins that are chosen per place from the text before it alone. Under the hypothesis that every token was drawn
from its place's distribution, the counts minus their expectations are a sum of martingale differences, whose
covariance is the sum of those of the places; so the quadratic form of counts and covariance is asymptotically
chi-square.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


SIGNIFICANCE = 1e-4  # one false alarm in ten thousand examinations
_MIN_VARIANCE = 5.0  # of a bin's count: with less, the count is far from normal, so the bin is pooled with others


@dataclass(frozen=True, slots=True)
class Fit:
    """How well the counts fit.

    Attributes:
        draws: tokens counted.
        chi_square: of the counts; 0 when everything had to be pooled into one bin.
        degrees: of freedom.
        total_variation: half the sum of the absolute differences between observed and expected shares of the bins.
    """

    draws: int
    chi_square: float
    degrees: int
    total_variation: float

    @property
    def p_value(self) -> float:
        """Probability of so large a `chi_square` when all tokens were drawn as they should."""
        if self.degrees == 0:
            return 1.0
        half = torch.tensor([self.degrees / 2, self.chi_square / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))

    @property
    def fits(self) -> bool:
        return self.p_value >= SIGNIFICANCE

    def __str__(self) -> str:
        return (
            f"chi-square {self.chi_square:.1f} with {self.degrees} degrees of freedom (p = {self.p_value:.2g}), "
            f"total variation {self.total_variation:.3f}, {self.draws} draws"
        )


def goodness_of_fit(probabilities: Tensor, bins: Tensor) -> Fit:
    """Compare where tokens fell with where they should fall.

    Args:
        probabilities: `[places, bins]` of each bin at each place; rows sum to 1.
        bins: `[places]` the bin that the token of each place fell into.
    """
    probabilities = probabilities.double()
    observed = torch.bincount(bins, minlength=probabilities.shape[1]).double()
    expected = probabilities.sum(0)
    covariance = torch.diag(expected) - probabilities.T @ probabilities
    total_variation = float((observed - expected).abs().sum() / 2 / len(bins))
    pooling = _pooling(covariance)  # [pooled, bins]
    difference = pooling @ (observed - expected)
    covariance = pooling @ covariance @ pooling.T
    degrees = len(pooling) - 1  # the last count follows from the others
    chi_square = 0.0
    if degrees:
        solved = torch.linalg.solve(covariance[:-1, :-1], difference[:-1])
        chi_square = float(difference[:-1] @ solved)
    return Fit(len(bins), chi_square, degrees, total_variation)


def _pooling(covariance: Tensor) -> Tensor:
    """0 and 1, `[pooled, bins]`: bins of little variance are merged with the next smallest until none is left."""
    groups = [[index] for index in range(len(covariance))]

    def variance(group: list[int]) -> float:
        return float(covariance[group][:, group].sum())

    while len(groups) > 1:
        groups.sort(key=variance)
        if variance(groups[0]) >= _MIN_VARIANCE:
            break
        groups[:2] = [groups[0] + groups[1]]
    pooling = torch.zeros(len(groups), len(covariance), dtype=covariance.dtype)
    for row, group in enumerate(groups):
        pooling[row, group] = 1.0
    return pooling
