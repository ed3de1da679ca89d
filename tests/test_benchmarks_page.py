"""The tables of the studies' page of results are those that docs/make_benchmarks.py renders from its files."""

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from training.evidence.__main__ import MEASURED
from training.evidence.__main__ import main as evidence
from training.evidence.page import PAGE as NAME


ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_benchmarks.py"))
PAGE: Path = SCRIPT["PAGE"]
EVIDENCE = ROOT / NAME
MARKS = [mark[2] for mark in SCRIPT["MARK"].finditer(PAGE.read_text(encoding="utf-8"))]


def test_the_page_is_what_the_results_files_say() -> None:
    message = "results have changed: run `python docs/make_benchmarks.py` and look at the difference"
    assert SCRIPT["render"]() == PAGE.read_text(encoding="utf-8"), message


def test_every_figure_in_a_table_stands_between_marks() -> None:
    prose = SCRIPT["MARK"].sub("", PAGE.read_text(encoding="utf-8"))
    assert prose.count("<!--") == 0, "a mark is not closed, or stands inside another"
    assert not re.findall(r"^\|.*\d\.\d.*$", prose, re.MULTILINE)


def test_the_matrix_of_aiperf_is_its_file() -> None:
    matrix = ROOT / "training" / "studies" / "measurements" / "smollm2-aiperf.csv"
    assert f"```text\n{matrix.read_text(encoding='utf-8')}```" in PAGE.read_text(encoding="utf-8")


def test_the_page_of_the_protocol_is_what_its_results_files_say(tmp_path: Path) -> None:
    """Pictures, too; `make docs` writes them."""
    for kept in [EVIDENCE, *EVIDENCE.parent.glob("question-*.svg")]:
        shutil.copy(kept, tmp_path)
    assert evidence(["--render", "--page", str(tmp_path / EVIDENCE.name), "--measured", str(ROOT / MEASURED)]) == 0
    for drawn in tmp_path.iterdir():
        assert drawn.read_text(encoding="utf-8") == (EVIDENCE.parent / drawn.name).read_text(encoding="utf-8")


@pytest.mark.parametrize("mark", MARKS, ids=lambda value: str(value)[-60:])
def test_a_table_has_rows_of_one_width_and_links_its_files(mark: str) -> None:
    lines = SCRIPT["fill"](mark).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) > 2
    assert len({line.count("|") for line in table}) == 1
    for file in mark.split():
        assert re.search(rf"\]\((\.\./)+{re.escape(file)}\)", "\n".join(lines))


@pytest.mark.parametrize("fact", [{"noise": {"accepted": True, "load_before": 0.0}}, {"partial": True}], ids=str)
def test_a_file_that_proves_nothing_is_refused_by_name(fact: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"noise": {"accepted": False}, "partial": False} | fact))
    with pytest.raises(ValueError, match=r"results\.json is noisy or partial"):
        SCRIPT["Results"].load(str(file))


def test_the_engine_has_a_row_for_each_way_with_its_compiled_figures_beside_it_or_blanks() -> None:
    row = {"model": "1b", "way": "tree 8/7/1, tau 4", "tokens_per_second": 30.04, "tau": 4.0, "ratio": 3.0}
    row |= {"efficiency": 0.75, "compiled_ratio": 2.0, "compiled_efficiency": 0.5}
    also = row | {"way": "tree 8/7/1, tau 4, compiled", "tokens_per_second": 50.0}

    def last_row(rows: list[dict[str, Any]]) -> str:
        return str(SCRIPT["engine"]([SCRIPT["Results"]("a/engine.json", {"rows": rows})]).splitlines()[-1])

    eager = "| 1b | [engine](../../a/engine.json) | 8/7/1, tau 4 | 30.0 | 4.00 | 3.00 | 0.75 |"
    assert last_row([row]) == f"{eager}  |  |  |  |"
    assert last_row([row, also]) == f"{eager} 50.0 | 4.00 | 2.00 | 0.50 |"
