"""Chooses the prompts of a benchmark, so that none was learned from or searched on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .config import BEST_FIXED, BenchConfig
from .prompts import Dialogue, read_dialogues, spread


_MAX_SEARCHED = 8  # prompts, shared among the datasets


@dataclass(frozen=True, slots=True)
class Selection:
    """The prompts of a benchmark.

    Attributes:
        evaluated: are answered by every method.
        searched: others, to find the best fixed tree on. Empty if it is not wanted, or if none is left and it was not
            asked for by name.
    """

    evaluated: list[Dialogue]
    searched: list[Dialogue]

    @classmethod
    def of(cls, config: BenchConfig, trained_on: Mapping[str, set[str] | None]) -> Self:
        """Read the datasets and choose.

        Args:
            config: names the datasets.
            trained_on: head or policy -> fingerprints of prompts that it learned from; `None` if unknown.

        Raises:
            ValueError: a dataset is not there, or the evaluation would not be fair.
        """
        check_stems(config.datasets)
        sources = [read_dialogues(source, config.split) for source in config.datasets]
        evaluated = [dialogue for rows in sources for dialogue in spread(rows, config.limit)]
        is_wanted = config.methods is None or BEST_FIXED in config.methods
        searched = _to_search(config, sources, evaluated) if is_wanted else []
        check_apart(evaluated, {dialogue.fingerprint for dialogue in searched}, "those of --search-dataset")
        for name, hashes in trained_on.items():
            check_apart(evaluated, hashes or set(), f"the training prompts of {name}")
        return cls(evaluated, searched)


def _to_search(config: BenchConfig, sources: list[list[Dialogue]], evaluated: list[Dialogue]) -> list[Dialogue]:
    """Choose from `--search-dataset`, or from what the limit leaves of the datasets."""
    if config.search_dataset:
        return spread(read_dialogues(config.search_dataset, config.split), _MAX_SEARCHED)
    taken = {dialogue.fingerprint for dialogue in evaluated}
    rest = [[dialogue for dialogue in rows if dialogue.fingerprint not in taken] for rows in sources]
    each = max(1, _MAX_SEARCHED // len(sources))
    found = [dialogue for rows in rest if rows for dialogue in spread(rows, each)]
    if not found and config.methods is not None:
        raise ValueError(
            "All prompts are evaluated, and none is left to find the best fixed tree on. Lower --limit, pass "
            "--search-dataset, or choose --methods without best-fixed."
        )
    return found


def check_stems(sources: Sequence[str]) -> None:
    """Raises ValueError when two datasets would have one name in the table."""
    stems = [Path(source).stem for source in sources]
    odd = sorted({stem for stem in stems if stems.count(stem) > 1 or stem == "all"})
    if odd:
        raise ValueError(
            f"The names of datasets must differ, and none may be `all`, got {', '.join(odd)}. Give the files other "
            "names."
        )


def check_apart(evaluated: Sequence[Dialogue], others: set[str], what: str) -> None:
    """Refuse to evaluate on prompts that were learned from or searched on.

    Raises:
        ValueError: names the first of them and how many there are.
    """
    shared = [dialogue.name for dialogue in evaluated if dialogue.fingerprint in others]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(evaluated)} prompts to evaluate are among {what}, for example {shared[0]}. Pass a "
            "dataset with other prompts."
        )
