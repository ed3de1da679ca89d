"""The figures of the protocol: speeds with paired intervals over requests and processes, shares, permutations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np


Row = Mapping[str, Any]  # an answer: `arm`, `prompt`, `turn`, `tokens`, `forwards`, `seconds`, and more
_DRAWS = 2000
_Z = 1.959964  # of a 95% interval


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of an arm over those of its base, on the same requests.

    Attributes:
        low: 2.5th percentile, processes and prompts drawn with replacement; `high` the 97.5th.
        lowest: of the processes, each alone; `highest` likewise.
    """

    ratio: float
    low: float
    high: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


def speed(processes: Sequence[Sequence[Row]], arm: str, base: str) -> Speed:
    """Compare two arms.

    Args:
        processes: the answers of each. All of a prompt's turns and repeats are one request.
        arm: that is compared.
        base: with this one.

    Raises:
        ValueError: a process lacks a prompt of either arm, so that nothing is paired.
    """
    prompts = sorted({row["prompt"] for row in processes[0]})
    own, other = (_totals(processes, name, prompts) for name in (arm, base))
    alone = _rates(own.sum(2)) / _rates(other.sum(2))
    ratio = float(_rates(own.sum((1, 2))) / _rates(other.sum((1, 2))))
    drawn = np.random.default_rng(0)
    of_processes = drawn.multinomial(len(processes), np.full(len(processes), 1 / len(processes)), _DRAWS)
    of_prompts = drawn.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), _DRAWS)
    rates = [_rates(np.einsum("dp,cpn,dn->cd", of_processes, totals, of_prompts)) for totals in (own, other)]
    low, high = np.percentile(rates[0] / rates[1], [2.5, 97.5])
    return Speed(ratio, float(low), float(high), float(alone.min()), float(alone.max()))


def _totals(processes: Sequence[Sequence[Row]], arm: str, prompts: Sequence[str]) -> np.ndarray:
    """Tokens and seconds, `[2, processes, prompts]`."""
    found = np.zeros((2, len(processes), len(prompts)))
    places = {prompt: place for place, prompt in enumerate(prompts)}
    for number, rows in enumerate(processes):
        for row in rows:
            if row["arm"] == arm:
                found[:, number, places[row["prompt"]]] += row["tokens"], row["seconds"]
    if not found[0].all():
        raise ValueError(f"The arm {arm} did not answer every prompt in every process, so nothing is paired.")
    return found


def _rates(totals: np.ndarray) -> np.ndarray:
    return np.asarray(totals[0] / totals[1])


def tau(processes: Sequence[Sequence[Row]], arm: str) -> float:
    """Tokens per forward of the target, over all answers."""
    own = [row for rows in processes for row in rows if row["arm"] == arm]
    return float(sum(row["tokens"] for row in own) / sum(row["forwards"] for row in own))


def wilson(successes: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, JASA 22, 1927)."""
    share, spread = successes / of, _Z * sqrt(successes * (of - successes) / of + _Z * _Z / 4) / of
    middle, scale = share + _Z * _Z / (2 * of), 1 + _Z * _Z / of
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def permutation_p(
    own: Sequence[Sequence[int]], other: Sequence[Sequence[int]], draws: int = 500
) -> tuple[float, float]:
    """Total variation between two groups of sampled texts, and its p-value by permutation of the groups.

    The distance is the mean over positions of that of the tokens' frequencies there; texts are of one length.
    """
    texts, count = np.array([*own, *other]), len(own)
    said = np.hstack([column[:, None] == np.unique(column) for column in texts.T]).astype(float)
    drawn = np.random.default_rng(0)
    order = np.array([np.arange(len(texts)), *(drawn.permutation(len(texts)) for _ in range(draws))])
    told = (order < count).astype(float) @ said  # of the first group: as it is, then as it was drawn
    apart = np.abs(told / count - (said.sum(0) - told) / (len(texts) - count)).sum(1) / 2 / texts.shape[1]
    return float(apart[0]), float((apart >= apart[0] - 1e-12).sum() / (1 + draws))
