"""Two methods on the texts that both wrote alike.

In half precision texts differ from near-ties on, and what follows may copy the prompt or not: one of two answers may
then take a third of the forwards, whichever method wrote it. Over many prompts that evens out, over a few it does not.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

from .runs import Run
from .timing import compare


@dataclass(frozen=True, slots=True)
class SameTexts:
    """How much faster `method` wrote those texts than `base`.

    Attributes:
        method: after `base` in the table.
        base: what it is compared with.
        texts: written alike by both, repeats counted.
        of: written by both.
        ratio: total seconds of `base` over those of `method`.
        low: of the 95% interval over prompts.
        high: of the same.
    """

    method: str
    base: str
    texts: int
    of: int
    ratio: float
    low: float
    high: float


def same_texts(runs: Sequence[Run], names: Sequence[str]) -> list[SameTexts]:
    """All pairs of `names` that wrote a text alike, in their order."""
    cells: dict[Hashable, dict[str, Run]] = {}
    for run in runs:
        cells.setdefault(run.timing.cell, {})[run.timing.method] = run
    found = []
    for base, method in combinations(names, 2):
        pairs = [(cell[base], cell[method]) for cell in cells.values() if base in cell and method in cell]
        alike = [pair for pair in pairs if pair[0].token_ids.tolist() == pair[1].token_ids.tolist()]
        if alike:
            interval = compare([run.timing for pair in alike for run in pair], method, base)
            found.append(SameTexts(method, base, len(alike), len(pairs), interval.ratio, interval.low, interval.high))
    return found
