"""What was measured, and the rates that follow from it. Pure functions; knows nothing of models."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Measurement:
    """One prompt decoded once.

    Attributes:
        method: its name in the table.
        prompt: `dataset/row`.
        repeat: from 0.
        tokens: written, the end token included, nothing after it.
        target_forwards: prefill included.
        seconds: of the whole call.
    """

    method: str
    prompt: str
    repeat: int
    tokens: int
    target_forwards: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One row of the table.

    Attributes:
        tokens_per_second: total tokens over total seconds.
        ratio: of that to plain decoding.
        low: lower end of the ratio's 95% interval over prompts.
        high: upper end.
        tau: tokens per target forward.
        spread: slowest over fastest repeat, minus one: how quiet the machine was.
    """

    method: str
    tokens_per_second: float
    ratio: float
    low: float
    high: float
    tau: float
    spread: float


def token_count(token_ids: Sequence[int], end_ids: set[int], most: int) -> int:
    """Tokens of an answer, counted alike for every method: up to the first end token, and never above `most`."""
    ended = next((number for number, token in enumerate(token_ids, start=1) if token in end_ids), len(token_ids))
    return min(ended, most)


def rate(measurements: Sequence[Measurement]) -> float:
    """Total tokens over total seconds."""
    return sum(m.tokens for m in measurements) / sum(m.seconds for m in measurements)


def summarise(measurements: Sequence[Measurement], method: str, plain: str = "plain", *, draws: int = 2000) -> Summary:
    """One method against plain decoding, over all prompts and repeats."""
    own = [m for m in measurements if m.method == method]
    base = [m for m in measurements if m.method == plain]
    low, high = bootstrap_interval(_by_prompt(own), _by_prompt(base), draws=draws)
    repeats = [rate([m for m in own if m.repeat == repeat]) for repeat in sorted({m.repeat for m in own})]
    return Summary(
        method=method,
        tokens_per_second=rate(own),
        ratio=rate(own) / rate(base),
        low=low,
        high=high,
        tau=sum(m.tokens for m in own) / sum(m.target_forwards for m in own),
        spread=max(repeats) / min(repeats) - 1,
    )


def bootstrap_interval(
    own: Sequence[Sequence[Measurement]],
    base: Sequence[Sequence[Measurement]],
    *,
    draws: int = 2000,
    choose: Callable[[int], list[int]] | None = None,
) -> tuple[float, float]:
    """The middle 95% of the ratio `rate(own) / rate(base)` over prompts drawn with replacement.

    Args:
        own: measurements of each prompt.
        base: of the same prompts in the same order, so that a draw is paired.
        draws: samples of prompts.
        choose: indices of one sample, given the number of prompts; seeded random ones when `None`.
    """
    if choose is None:
        generator = random.Random(0)

        def choose(count: int) -> list[int]:
            return generator.choices(range(count), k=count)

    ratios = []
    for _ in range(draws):
        drawn = choose(len(own))
        numerator = rate([m for index in drawn for m in own[index]])
        ratios.append(numerator / rate([m for index in drawn for m in base[index]]))
    ratios.sort()
    return ratios[int(0.025 * draws)], ratios[min(int(0.975 * draws), draws - 1)]


def _by_prompt(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    prompts = sorted({m.prompt for m in measurements})
    return [[m for m in measurements if m.prompt == prompt] for prompt in prompts]
