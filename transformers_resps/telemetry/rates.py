"""Rates of tokens per second, and how sure a ratio of two of them is."""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class Timed(Protocol):
    """Anything with a number of tokens and the seconds that they took."""

    @property
    def tokens(self) -> int: ...

    @property
    def seconds(self) -> float: ...


class Timing(NamedTuple):
    """Tokens of one text, and the seconds that they took."""

    tokens: int
    seconds: float


def rate(timed: Iterable[Timed]) -> float:
    """Return total tokens over total seconds."""
    kept = list(timed)
    return sum(one.tokens for one in kept) / sum(one.seconds for one in kept)


def bootstrap_interval(
    own: Sequence[Sequence[Timed]], base: Sequence[Sequence[Timed]], *, draws: int = 2000
) -> tuple[float, float]:
    """Return the middle 95% of `rate(own) / rate(base)` over prompts drawn with replacement.

    Args:
        own: answers to each prompt, all its turns and repeats together.
        base: of the same prompts in the same order, so that a draw is paired.
        draws: samples of prompts, the same ones in every call.
    """
    totals = [
        [(sum(m.tokens for m in part), sum(m.seconds for m in part)) for part in prompts] for prompts in (own, base)
    ]
    generator = random.Random(0)
    ratios = []
    for _ in range(draws):
        drawn = generator.choices(range(len(own)), k=len(own))
        (tokens, seconds), (base_tokens, base_seconds) = (
            (sum(prompts[i][0] for i in drawn), sum(prompts[i][1] for i in drawn)) for prompts in totals
        )
        ratios.append(tokens / seconds / (base_tokens / base_seconds))
    ratios.sort()
    return ratios[int(0.025 * draws)], ratios[min(int(0.975 * draws), draws - 1)]
