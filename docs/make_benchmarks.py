"""Fill the tables of the studies' page of results from the files named there: `python docs/make_benchmarks.py`.

It writes what stands between `<!-- table FILE ... -->` and `<!-- end -->`; the rest is prose.
"""

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "training" / "studies" / "BENCHMARKS.md"
MARK = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
COMPILED = ", compiled"  # after the name of a method


@dataclass(frozen=True)
class Results:
    """A results file, by its path in the repository."""

    path: str
    data: dict[str, Any]

    @classmethod
    def load(cls, path: str) -> "Results":
        """Read a file; one that is noisy or not finished is a `ValueError`."""
        data = json.loads((ROOT / path).read_text(encoding="utf-8"))
        if data.get("noise", {}).get("accepted") or data.get("partial"):
            raise ValueError(f"{path} is noisy or partial. Measure it again, or remove it from {PAGE.name}.")
        return cls(path, data)

    @property
    def link(self) -> str:
        file = Path(self.path)
        return f"[{file.stem}](../../{self.path})"

    @property
    def asked(self) -> dict[str, Any]:
        return dict(self.data.get("settings") or self.data.get("arguments", {}))

    @property
    def conditions(self) -> str:
        data, versions = self.data, self.data.get("versions", self.data)
        layers = {True: ", prepacked", False: ", stock layers"}.get(data.get("packed", self.asked.get("pack")), "")
        software = f"torch {versions['torch']}, Transformers {versions['transformers']}"
        asked_for_pages = "hugetlb=1" in data.get("environment", {}).get("GLIBC_TUNABLES", "")
        pages = ", huge pages" if asked_for_pages or data.get("huge_page_mib") else ""
        return f"{data['device']}, {data['dtype']}, threads: {data['threads']}{layers}{pages}, {software}"


def table(left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of words, then columns of numbers."""
    lines = [[*left, *right], ["---"] * len(left) + ["---:"] * len(right), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def engine(found: list[Results]) -> str:
    """Of `training.studies.engine_speed`: what of tau became speed, eager and compiled, each against its own plain."""
    rows = []
    for one in found:
        ways = {(row["model"], row["way"]): row for row in one.data["rows"]}
        for (model, way), row in ways.items():
            if way.endswith(COMPILED):
                continue
            cells = _engine_cells(row, "ratio", "efficiency")
            also = ways.get((model, way + COMPILED))
            cells += [""] * 4 if also is None else _engine_cells(also, "compiled_ratio", "compiled_efficiency")
            rows.append([model, one.link, way.removeprefix("tree ").replace("auto", "`auto`"), *cells])
    numbers = ["tokens/s", "tau", "ratio to plain", "that / tau"]
    compiled_numbers = ["compiled tokens/s", "tau", "ratio to compiled plain", "that / tau"]
    return table(["target", "results file", "method"], [*numbers, *compiled_numbers], rows)


def _engine_cells(row: dict[str, Any], ratio: str, efficiency: str) -> list[str]:
    return [f"{row['tokens_per_second']:.1f}", *(two(row[name]) for name in ("tau", ratio, efficiency))]


def fill(mark: str) -> str:
    """Conditions, each once with the files that share them, and the table."""
    found = [Results.load(word) for word in mark.split()]
    files = {one.conditions: [o.link for o in found if o.conditions == one.conditions] for one in found}
    wrap = textwrap.TextWrapper(119, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    captions = [wrap.fill(f"- {', '.join(links)}: {conditions}.") for conditions, links in files.items()]
    return "\n".join([*captions, "", engine(found)])


def render() -> str:
    """The page with all of its tables written anew."""
    return MARK.sub(lambda mark: f"{mark[1]}\n{fill(mark[2])}\n\n{mark[3]}", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
