"""Results files: one experiment in one process, with a checksum; what cannot stand in a table is refused by name."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .quiet import Watch


AGAIN = "Measure it again with `make evidence`, or restore it."
_CHECKSUM = "checksum"
_DIGITS = 7  # significant: a second to the microsecond and better


class UnfitResultsError(ValueError):
    """A results file that no table may hold."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A results file that is whole; the fields are those of `measuring.results_of`."""

    file: Path
    data: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Measured":
        """Read what `seal` wrote. Raises `UnfitResultsError` for a file that is damaged or was edited."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            told = data.pop(_CHECKSUM)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UnfitResultsError(f"{file} is no results file ({error!r}). {AGAIN}") from error
        if told != _checksum(data):
            raise UnfitResultsError(f"{file} was edited: its checksum is of other content. {AGAIN}")
        return cls(file, data)

    @property
    def code(self) -> str:
        return str(self.data["code"]["code_sha256"])

    @property
    def processor(self) -> str:
        return str(self.data["machine"]["device"])

    @property
    def reasons(self) -> list[str]:
        """Why its figures may not be shown by the present limits of the protocol; empty for a quiet run."""
        told = dict(self.data["quiet"])
        was_judged = bool(told.pop("reasons"))
        return Watch(**told).reasons if was_judged else []

    def check_code(self, code: str, page: str) -> None:
        """Raises `UnfitResultsError` when it was measured with other code than the page is of."""
        if self.code != code:
            commit = self.data["code"]["commit"] or "no commit"
            raise UnfitResultsError(
                f"{self.file} was measured with the code of {commit} ({self.code[:12]}), but {page} is of other code "
                f"({code[:12]}). {AGAIN}"
            )

    def check_arms(self, arms: Collection[str]) -> None:
        """Raises `UnfitResultsError` when an arm has no answers and no reason for it."""
        answered = {row["arm"] for row in self.data["rows"]}
        missing = [arm for arm in arms if arm not in answered and arm not in self.data["left_out"]]
        if missing:
            raise UnfitResultsError(f"{self.file} lacks the arm {', '.join(missing)}. {AGAIN}")


def check_together(files: Sequence[Measured]) -> None:
    """Raises `UnfitResultsError` when files of one row are of two processors, or of other prompts or settings."""
    for one in files[1:]:
        first = files[0]
        if one.processor != first.processor:
            raise UnfitResultsError(
                f"{first.file} is of {first.processor} and {one.file} of {one.processor}, but they stand in one row. "
                "Keep the files of one processor in a folder of its own."
            )
        odd = [name for name in ("settings", "arms", "weights") if one.data[name] != first.data[name]]
        if odd:
            raise UnfitResultsError(f"{first.file} and {one.file} differ in {', '.join(odd)}. {AGAIN}")


def seal(file: Path, results: Mapping[str, Any]) -> None:
    """Write a results file atomically, with its checksum last. Numbers have seven digits, rows a line each."""
    data = json.loads(json.dumps(_rounded(dict(results))))
    parts = [f"{json.dumps(name)}: {_written(part)}" for name, part in (data | {_CHECKSUM: _checksum(data)}).items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    unfinished.replace(file)


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _written(part: Any) -> str:
    if isinstance(part, list) and part and all(isinstance(item, dict) for item in part):
        return "[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in part) + "\n]"
    return json.dumps(part, separators=(",", ":"))


def _rounded(part: Any) -> Any:
    if isinstance(part, dict):
        return {str(name): _rounded(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_rounded(value) for value in part]
    return float(f"{part:.{_DIGITS}g}") if isinstance(part, float) else part
