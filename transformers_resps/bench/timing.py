"""Holds how long answers took, and compares methods."""

from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from ..generation.output import up_to_end
from ..telemetry.report import bootstrap_interval, rate


PLAIN = "plain"
COMPILED = ", compiled"  # after the name of a method whose forwards are compiled
COMPILED_PLAIN = PLAIN + COMPILED


class Cell(NamedTuple):
    """A place that each method answers once."""

    prompt: str
    turn: int
    temperature: float
    repeat: int


@dataclass(frozen=True, slots=True)
class AnswerTiming:
    """How long one method took to answer one turn of one prompt.

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
    def cell(self) -> Cell:
        return Cell(self.prompt, self.turn, self.temperature, self.repeat)

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
        efficiency: ratio over tau, the share of tau that became speed.
        compiled_ratio: of its rate to that of compiled plain decoding; `None` where that was not measured.
        compiled_efficiency: that over tau.
        spread: fastest over slowest repeat, minus one: the machine's noise.
        temperature: 0 is greedy; `None` over several.
    """

    method: str
    tokens_per_second: float
    ratio: float
    low: float
    high: float
    tau: float
    efficiency: float
    compiled_ratio: float | None
    compiled_efficiency: float | None
    spread: float
    temperature: float | None = 0.0


def token_count(token_ids: list[int], end_ids: Container[int], most: int) -> int:
    """Count the tokens of an answer, alike for every method: up to the first end token, and never above `most`."""
    return min(len(up_to_end(token_ids, end_ids)), most)


def summarise(timings: Sequence[AnswerTiming], method: str) -> Summary:
    """Compare one method with plain decoding, over all prompts and repeats."""
    own = [m for m in timings if m.method == method]
    interval = compare(timings, method, PLAIN)
    repeats = [rate(part) for part in grouped(own, lambda m: m.repeat)]
    temperatures = {m.temperature for m in own}
    tau = sum(m.tokens for m in own) / sum(m.target_forwards for m in own)
    has_compiled = any(m.method == COMPILED_PLAIN for m in timings)
    compiled = compare(timings, method, COMPILED_PLAIN).ratio if has_compiled else None
    return Summary(
        method=method,
        tokens_per_second=rate(own),
        ratio=interval.ratio,
        low=interval.low,
        high=interval.high,
        tau=tau,
        efficiency=interval.ratio / tau,
        compiled_ratio=compiled,
        compiled_efficiency=None if compiled is None else compiled / tau,
        spread=max(repeats) / min(repeats) - 1,
        temperature=temperatures.pop() if len(temperatures) == 1 else None,
    )


def compare(timings: Sequence[AnswerTiming], method: str, base: str) -> Interval:
    """Return the rate of one method over that of another, on the cells that both have answered."""
    both = {m.cell for m in timings if m.method == method} & {m.cell for m in timings if m.method == base}
    kept = sorted((m for m in timings if m.cell in both), key=lambda m: m.prompt)
    own, other = (grouped((m for m in kept if m.method == name), lambda m: m.prompt) for name in (method, base))
    low, high = bootstrap_interval(own, other)
    return Interval(rate(chain.from_iterable(own)) / rate(chain.from_iterable(other)), low, high)


def grouped(timings: Iterable[AnswerTiming], key: Callable[[AnswerTiming], Hashable]) -> list[list[AnswerTiming]]:
    """Group timings of the same key, in the order in which the keys come first."""
    found: dict[Hashable, list[AnswerTiming]] = defaultdict(list)
    for m in timings:
        found[key(m)].append(m)
    return list(found.values())
