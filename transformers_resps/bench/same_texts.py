"""Compares two methods on the texts that both wrote alike.

In half precision texts differ from near-ties on, and what follows may copy the prompt or not: one of two answers may
then take a third of the forwards, whichever method wrote it. Over many prompts that evens out, over a few it does not.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from .runs import Run
from .timing import Cell, compare


def same_texts(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Compare all pairs of `names` that wrote a text alike, in their order.

    Returns:
        `method` and `base`; `texts` that both wrote alike, `of` all that both wrote; `ratio`, `low` and `high` of how
        much faster `method` wrote those texts.
    """
    cells: dict[Cell, dict[str, Run]] = {}
    for run in runs:
        cells.setdefault(run.timing.cell, {})[run.timing.method] = run
    found = []
    for base, method in combinations(names, 2):
        pairs = [(cell[base], cell[method]) for cell in cells.values() if base in cell and method in cell]
        alike = [pair for pair in pairs if pair[0].token_ids.tolist() == pair[1].token_ids.tolist()]
        if alike:
            interval = compare([run.timing for pair in alike for run in pair], method, base)
            found.append({"method": method, "base": base, "texts": len(alike), "of": len(pairs), **asdict(interval)})
    return found
