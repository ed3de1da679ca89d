"""The tables of docs/benchmarks.md are those that docs/make_benchmarks.py renders from the results files."""

import json
import re
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_benchmarks.py"))
WRITTEN = SCRIPT["PAGE"].read_text(encoding="utf-8")
MARKS = [mark[2] for mark in SCRIPT["MARK"].finditer(WRITTEN)]


def test_the_page_is_what_the_results_files_say() -> None:
    message = "results have changed: run `python docs/make_benchmarks.py` and look at the difference"
    assert SCRIPT["render"](WRITTEN) == WRITTEN, message


def test_every_figure_in_a_table_stands_between_marks() -> None:
    prose = SCRIPT["MARK"].sub("", WRITTEN)
    assert prose.count("<!--") == 0, "a mark is not closed, or stands inside another"
    assert not re.findall(r"^\|.*\d\.\d.*$", prose, re.MULTILINE)


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark[:60])
def test_a_table_has_rows_of_one_width_and_links_its_files(mark: str) -> None:
    lines = SCRIPT["fill"](mark).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) > 2
    assert len({line.count("|") for line in table}) == 1
    for file in (word for word in mark.split() if word.endswith(".json")):
        assert f"](../{file})" in "\n".join(lines)


@pytest.mark.parametrize("fact", [{"noise": {"accepted": True, "load_before": 0.0}}, {"partial": True}], ids=str)
def test_a_file_that_proves_nothing_is_refused_by_name(fact: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"noise": {"accepted": False}, "partial": False} | fact))
    with pytest.raises(ValueError, match=r"results\.json is noisy or partial"):
        SCRIPT["Results"].load(str(file))
