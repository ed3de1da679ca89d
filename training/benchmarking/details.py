"""What the results hold besides the rows of the table: the shapes that steps chose, and pairs of methods."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from transformers_resps import StepRecord
from transformers_resps.tools.results import Cell, Run, compare


_MOST_SHAPES = 8


def shapes_chosen(answers: Sequence[Sequence[StepRecord]]) -> dict[str, int]:
    """Count the steps after the prefill by their shape; the most frequent shapes first, and no others."""
    shapes = Counter(str(step.shape) for steps in answers for step in steps[1:])
    return dict(shapes.most_common(_MOST_SHAPES))


def same_texts(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Compare all pairs of `names` on the texts that both wrote alike, in their order.

    In half precision texts differ from near-ties on, and what follows may copy the prompt or not: one of two answers
    may then take a third of the forwards, whichever method wrote it. Over a few prompts that does not even out.

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
