"""What was measured, and the rates that follow from it."""

import random
from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Protocol

from ..generation.sequences import up_to_end


PLAIN = "plain"
_MIN_TOKENS = 8  # of an answer that counts for the machine's noise
_MIN_REPEATED = 8  # rates of texts that were repeated, before those that were not are left out


class Timed(Protocol):
    """Anything with a number of tokens and the seconds that they took."""

    @property
    def tokens(self) -> int: ...

    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True, slots=True)
class AnswerTiming:
    """One turn of one prompt answered once.

    Attributes:
        method: its name in the table.
        prompt: `dataset/row`.
        repeat: from 0; under sampling also the seed.
        tokens: written, the end token included, nothing after it.
        target_forwards: prefill included.
        seconds: of the whole call.
        turn: of the conversation, from 1.
        temperature: 0 is greedy.
        prefill_seconds: from the call to the target's second forward.
    """

    method: str
    prompt: str
    repeat: int
    tokens: int
    target_forwards: int
    seconds: float
    turn: int = 1
    temperature: float = 0.0
    prefill_seconds: float = 0.0

    @property
    def dataset(self) -> str:
        return self.prompt.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio of two rates, and the middle 95% of it over prompts drawn with replacement."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One row of the table.

    Attributes:
        tokens_per_second: total tokens over total seconds.
        ratio: of that to plain decoding.
        low: lower end of the ratio's 95% interval over prompts.
        high: upper end.
        tau: tokens per target forward.
        spread: fastest over slowest repeat, minus one: the machine's noise.
        temperature: 0 is greedy; `None` over several.
    """

    method: str
    tokens_per_second: float
    ratio: float
    low: float
    high: float
    tau: float
    spread: float
    temperature: float | None = 0.0


def token_count(token_ids: list[int], end_ids: Container[int], most: int) -> int:
    """Tokens of an answer, counted alike for every method: up to the first end token, and never above `most`."""
    return min(len(up_to_end(token_ids, end_ids)), most)


def rate(timed: Iterable[Timed]) -> float:
    """Total tokens over total seconds."""
    kept = list(timed)
    return sum(one.tokens for one in kept) / sum(one.seconds for one in kept)


def summarise(timings: Sequence[AnswerTiming], method: str) -> Summary:
    """One method against plain decoding, over all prompts and repeats."""
    own = [m for m in timings if m.method == method]
    interval = compare(timings, method, PLAIN)
    repeats = [rate(part) for part in grouped(own, lambda m: m.repeat)]
    temperatures = {m.temperature for m in own}
    return Summary(
        method=method,
        tokens_per_second=rate(own),
        ratio=interval.ratio,
        low=interval.low,
        high=interval.high,
        tau=sum(m.tokens for m in own) / sum(m.target_forwards for m in own),
        spread=max(repeats) / min(repeats) - 1,
        temperature=temperatures.pop() if len(temperatures) == 1 else None,
    )


def compare(timings: Sequence[AnswerTiming], method: str, base: str) -> Interval:
    """The rate of one method over that of another, on the prompts that both have answered as often."""
    per_prompt = {name: dict[str, list[AnswerTiming]]() for name in (method, base)}
    keys = [{place_of(m) for m in timings if m.method == name} for name in (method, base)]
    for m in timings:
        if m.method in per_prompt and place_of(m) in keys[0] & keys[1]:
            per_prompt[m.method].setdefault(m.prompt, []).append(m)
    prompts = sorted(per_prompt[base])
    own, other = ([per_prompt[name][prompt] for prompt in prompts] for name in (method, base))
    low, high = bootstrap_interval(own, other)
    return Interval(rate(m for part in own for m in part) / rate(m for part in other for m in part), low, high)


def place_of(m: AnswerTiming) -> tuple[Hashable, ...]:
    """What one run of each method shares: prompt, turn, temperature, repeat."""
    return m.prompt, m.turn, m.temperature, m.repeat


def bootstrap_interval(
    own: Sequence[Sequence[Timed]],
    base: Sequence[Sequence[Timed]],
    *,
    draws: int = 2000,
    choose: Callable[[int], list[int]] | None = None,
) -> tuple[float, float]:
    """The middle 95% of the ratio `rate(own) / rate(base)` over prompts drawn with replacement.

    Args:
        own: answers to each prompt, all its turns and repeats together.
        base: of the same prompts in the same order, so that a draw is paired.
        draws: samples of prompts.
        choose: indices of one sample, given the number of prompts; seeded random ones when `None`.
    """
    if choose is None:
        generator = random.Random(0)

        def choose(count: int) -> list[int]:
            return generator.choices(range(count), k=count)

    totals = [
        [(sum(m.tokens for m in part), sum(m.seconds for m in part)) for part in prompts] for prompts in (own, base)
    ]
    ratios = []
    for _ in range(draws):
        drawn = choose(len(own))
        (tokens, seconds), (base_tokens, base_seconds) = (
            (sum(prompts[i][0] for i in drawn), sum(prompts[i][1] for i in drawn)) for prompts in totals
        )
        ratios.append(tokens / seconds / (base_tokens / base_seconds))
    ratios.sort()
    return ratios[int(0.025 * draws)], ratios[min(int(0.975 * draws), draws - 1)]


def plain_spread(timings: Iterable[AnswerTiming]) -> float | None:
    """How noisy the machine was: interquartile range over median of plain decoding's rates; `None` below four.

    Prefill is left out, and each rate is divided by the mean of its own text's repeats, so that long prompts do not
    look like noise. In the middle of the second repeat only texts that were repeated count, or, while they are few,
    the means of all. Answers of fewer than eight tokens do not count.
    """
    told = [m for m in timings if m.method == PLAIN and m.tokens >= _MIN_TOKENS]
    texts = [
        [(m.tokens - 1) / (m.seconds - m.prefill_seconds) for m in part]
        for part in grouped(told, lambda m: (m.prompt, m.turn, m.temperature))
    ]
    repeated = [own for own in texts if len(own) > 1]
    if len(repeated) == len(texts) or sum(map(len, repeated)) >= _MIN_REPEATED:
        rates = [value / (sum(own) / len(own)) for own in repeated for value in own]
    else:
        rates = [sum(own) / len(own) for own in texts]
    if len(rates) < 4:
        return None
    low, middle, high = quantiles(rates, n=4, method="inclusive")
    return (high - low) / middle


def grouped(timings: Iterable[AnswerTiming], key: Callable[[AnswerTiming], Hashable]) -> list[list[AnswerTiming]]:
    """Measurements with the same key, in the order in which the keys come first."""
    found: dict[Hashable, list[AnswerTiming]] = defaultdict(list)
    for m in timings:
        found[key(m)].append(m)
    return list(found.values())
