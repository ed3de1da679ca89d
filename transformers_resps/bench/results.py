"""Writes and reads `results.json`. The schema is in docs/bench-results-schema.md."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..hub import RESULTS
from .methods import Method
from .noise import plain_spread
from .runs import Run
from .same_texts import same_texts
from .steps import StepSummary, summarise_steps
from .timing import AnswerTiming, grouped, summarise


SCHEMA_VERSION = 2
ALL = "all"
_DIGITS = 7  # significant: a second to the microsecond and better


def measured_part(methods: Sequence[Method], runs: Sequence[Run], ceilings: Sequence[AnswerTiming]) -> dict[str, Any]:
    """Return everything in the results that follows from the runs.

    Args:
        methods: in the order of the table.
        runs: of whole cells: every method answered.
        ceilings: what the oracle would have done in some of them; estimated, not measured.
    """
    timings = [run.timing for run in runs]
    names = [method.name for method in methods]
    return {
        "plain_spread": plain_spread(timings),
        "summaries": summaries_of(timings, names, ceilings),
        "pooled": _rows([*timings, *ceilings], names),
        "same_texts": same_texts(runs, names),
        "steps": {name: asdict(found) for name in names if (found := _steps_of(runs, name)) is not None},
        "measurements": [asdict(timing) for timing in timings],
        "ceilings": [asdict(ceiling) for ceiling in ceilings],
    }


def summaries_of(
    timings: Sequence[AnswerTiming], names: Sequence[str], ceilings: Sequence[AnswerTiming]
) -> dict[str, list[dict[str, Any]]]:
    """Return dataset, and `all`, -> rows by temperature and method: a `Summary`, and whether it was `measured`."""
    datasets = list(dict.fromkeys(m.dataset for m in timings))
    found: dict[str, list[dict[str, Any]]] = {}
    for dataset in [*datasets, ALL]:
        rows = found.setdefault(dataset, [])
        own = [m for m in [*timings, *ceilings] if dataset in (ALL, m.dataset)]
        for part in grouped(own, lambda m: m.temperature):
            rows += _rows(part, names)
    return found


def _rows(timings: Sequence[AnswerTiming], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each method; those that were not measured come last."""
    present = dict.fromkeys(m.method for m in timings)
    ordered = [name for name in names if name in present] + [name for name in present if name not in names]
    return [{**asdict(summarise(timings, name)), "measured": name in names} for name in ordered]


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """Write `results.json` atomically: a kill leaves the old file or the new one. Numbers have seven digits."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RESULTS
    unfinished = file.with_suffix(".tmp")
    parts = (f"{json.dumps(name)}: {_compact(part)}" for name, part in results.items())
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    unfinished.replace(file)
    return file


def _compact(part: Any) -> str:
    """Return JSON without blanks, an item of a list of objects on each line."""
    if isinstance(part, list) and part and all(isinstance(item, dict) for item in part):
        return "[\n" + ",\n".join(map(_compact, part)) + "\n]"
    return json.dumps(_rounded(part), separators=(",", ":"))


def _rounded(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _rounded(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_rounded(value) for value in part]
    return float(f"{part:.{_DIGITS}g}") if isinstance(part, float) else part


def read_results(file: Path) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Raises:
        ValueError: it is of another schema, or no such file at all.
    """
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = results.get("schema_version", results.get("schema"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as results of `resps bench` ({error}). Measure again.") from error
    if found != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema {found!r}, but this release reads {SCHEMA_VERSION}, see docs/bench-results-schema.md. "
            "Measure again with this release, or read the file with the release that wrote it."
        )
    return results


def _steps_of(runs: Sequence[Run], name: str) -> StepSummary | None:
    told = [run for run in runs if run.timing.method == name and run.steps]
    if not told:
        return None
    tokens, seconds = sum(run.timing.tokens for run in told), sum(run.timing.seconds for run in told)
    return summarise_steps([run.steps for run in told], tokens, seconds)
