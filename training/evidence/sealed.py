"""Results files: one experiment in one process of one version, with a checksum; unfit ones are refused by name."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from training.benchmarking.provenance import code
from transformers_resps.tools.results import AnswerTiming, rounded, write_results

from .quiet import Watch


AGAIN = "Measure it again with `make evidence`, or restore it."
CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"  # its headings are the releases that exist
_CHECKSUM = "checksum"
_PACKAGE = "transformers-resps"


class UnfitResultsError(ValueError):
    """A results file that no table may hold."""


@dataclass(frozen=True, slots=True)
class Version:
    """What a figure belongs to: a release of the package, and the first digits of the hash of its code."""

    release: str
    code: str

    @classmethod
    def of(cls, release: str, code_sha256: str) -> Self:
        return cls(release, code_sha256[:12])

    @classmethod
    def here(cls) -> Self:
        """Return the version of the checkout."""
        return cls.of(version(_PACKAGE), code()["code_sha256"])

    @property
    def folder(self) -> str:
        return f"{self.release}-{self.code}"

    def __str__(self) -> str:
        return f"{self.release} (code {self.code})"


@dataclass(frozen=True, slots=True)
class Measured:
    """A results file that is whole; the fields are those of `measuring.run`."""

    file: Path
    data: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> Self:
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
    def version(self) -> Version:
        """Return the version that it measured. Raises `UnfitResultsError` for one that does not exist."""
        release = self.data["machine"].get("versions", {}).get(_PACKAGE)
        known = re.findall(r"^## (\d\S*?)(?:,| |$)", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
        if release not in known or not self.data["code"].get("code_sha256"):
            raise UnfitResultsError(
                f"{self.file} measured an unknown version: {release}, but {CHANGELOG.name} has {', '.join(known)}. "
                f"{AGAIN}"
            )
        return Version.of(release, self.data["code"]["code_sha256"])

    @property
    def processor(self) -> str:
        return str(self.data["machine"]["device"])

    @property
    def watch(self) -> Watch:
        """How quiet the machine was."""
        return Watch(**{name: value for name, value in self.data["quiet"].items() if name != "reasons"})

    @property
    def timings(self) -> list[AnswerTiming]:
        """The answers that were timed, by arm; their repeat is the process."""
        return [
            AnswerTiming(
                row["arm"], row["prompt"], self.data["process"], row["tokens"], row.get("forwards", 1), row["seconds"],
                row["turn"], prefill_seconds=row.get("first", 0.0),
            )
            for row in self.data["rows"] if "seconds" in row
        ]  # fmt: skip

    def check_arms(self, arms: Collection[str]) -> None:
        """Raises `UnfitResultsError` when an arm lacks answers and has no reason for it."""
        answered: dict[str, set[str]] = {arm: set() for arm in arms}
        for row in self.data["rows"]:
            answered.setdefault(row["arm"], set()).add(row["prompt"])
        prompts = set().union(*answered.values())
        missing = [arm for arm in arms if answered[arm] != prompts and arm not in self.data["left_out"]]
        if missing:
            raise UnfitResultsError(f"{self.file} lacks answers of the arm {', '.join(missing)}. {AGAIN}")


def check_together(files: Sequence[Measured]) -> None:
    """Raises `UnfitResultsError` when files of one table are of two versions or processors."""
    for one in files[1:]:
        for kind, first, other in (
            ("version", files[0].version, one.version), ("processor", files[0].processor, one.processor),
        ):  # fmt: skip
            if first != other:
                raise UnfitResultsError(
                    f"{files[0].file} is of {kind} {first} and {one.file} of {other}, but they stand in one table. "
                    f"Keep the files of one {kind} in a folder of its own."
                )


def check_alike(files: Sequence[Measured]) -> None:
    """Raises `UnfitResultsError` when processes of one experiment had other prompts, settings, arms or weights."""
    for one in files[1:]:
        odd = [name for name in ("settings", "arms", "weights") if one.data[name] != files[0].data[name]]
        if odd:
            raise UnfitResultsError(f"{files[0].file} and {one.file} differ in {', '.join(odd)}. {AGAIN}")


def seal(file: Path, results: Mapping[str, Any]) -> None:
    """Write a results file atomically, with its checksum last."""
    data = json.loads(json.dumps(rounded(dict(results))))
    write_results(file, data | {_CHECKSUM: _checksum(data)})


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
