"""The tables of the pages of results are those that docs/make_benchmarks.py renders from the results files."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_benchmarks.py"))
PAGES = SCRIPT["PAGES"]
MARKS = [(page, mark[2]) for page in PAGES for mark in SCRIPT["MARK"].finditer(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_what_the_results_files_say(page: Path) -> None:
    message = "results have changed: run `python docs/make_benchmarks.py` and look at the difference"
    assert SCRIPT["render"](page) == page.read_text(encoding="utf-8"), message


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_in_a_table_stands_between_marks(page: Path) -> None:
    prose = SCRIPT["MARK"].sub("", page.read_text(encoding="utf-8"))
    assert prose.count("<!--") == 0, "a mark is not closed, or stands inside another"
    assert not re.findall(r"^\|.*\d\.\d.*$", prose, re.MULTILINE)


@pytest.mark.parametrize(("page", "mark"), MARKS, ids=lambda value: str(value)[-60:])
def test_a_table_has_rows_of_one_width_and_links_its_files(page: Path, mark: str) -> None:
    lines = SCRIPT["fill"](mark, page).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) > 2
    assert len({line.count("|") for line in table}) == 1
    for file in (word for word in mark.split() if word.endswith(".json")):
        assert re.search(rf"\]\((\.\./)+{re.escape(file)}\)", "\n".join(lines))


@pytest.mark.parametrize("fact", [{"noise": {"accepted": True, "load_before": 0.0}}, {"partial": True}], ids=str)
def test_a_file_that_proves_nothing_is_refused_by_name(fact: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"noise": {"accepted": False}, "partial": False} | fact))
    with pytest.raises(ValueError, match=r"results\.json is noisy or partial"):
        SCRIPT["Results"].load(str(file))


def made_up(methods: dict[str, dict[str, object]]) -> object:
    rows = [{"method": name, "temperature": 0.0, "measured": True, "low": 1.0, "high": 1.0} | row
            for name, row in methods.items()]  # fmt: skip
    asked = {"prompts": ["a/0"], "max_new_tokens": 8, "repeats": 1}
    data = {"head": "runs/tiny-head", "settings": asked, "summaries": {"a": rows, "all": rows}}
    return SCRIPT["Results"]("a/results.json", data | {"costs": {"verify": {"128": {"1": 1.0, "8": 2.0}}}})


def test_compiled_methods_have_columns_where_a_file_has_them() -> None:
    plain = {"ratio": 1.0, "tau": 1.0, "tokens_per_second": 9.0, "compiled_efficiency": 0.5}
    methods = {"plain": plain, "auto": plain | {"ratio": 2.0, "tau": 2.5, "compiled_efficiency": 0.4}}
    old = made_up(methods)
    assert "compiled" not in SCRIPT["overview"]([old], "0") and "compiled" not in SCRIPT["by_dataset"](
        [old], "tau", "0"
    )
    both = {"plain, compiled": plain | {"ratio": 2.0}, "auto, compiled": plain | {"ratio": 3.0}}
    new = made_up({"plain": plain, **both, "auto": methods["auto"]})
    head, _, *rows = SCRIPT["overview"]([old, new], "0").splitlines()
    assert "| plain, compiled | `auto`, compiled | `auto`, 95% interval |" in head
    assert rows[0].endswith("|  |  | 1.00 to 1.00 |") and rows[1].endswith("| 2.00 | 3.00 | 1.00 to 1.00 |")
    head, *rows = SCRIPT["by_dataset"]([new], "tau", "0").splitlines()
    assert head.endswith("| speed-up / tau | over compiled plain / tau |")
    assert "| `auto` | 2.50 | 2.50 | 0.80 | 0.40 |" in rows


def test_the_engine_has_a_row_for_each_way_with_its_compiled_figures_beside_it_or_blanks() -> None:
    row = {"model": "1b", "way": "tree 8/7/1, tau 4", "tokens_per_second": 30.04, "tau": 4.0, "ratio": 3.0}
    row |= {"efficiency": 0.75, "compiled_ratio": 2.0, "compiled_efficiency": 0.5}
    also = row | {"way": "tree 8/7/1, tau 4, compiled", "tokens_per_second": 50.0}

    def last_row(rows: list[dict[str, Any]]) -> str:
        return str(SCRIPT["engine"]([SCRIPT["Results"]("a/engine.json", {"rows": rows})]).splitlines()[-1])

    eager = "| 1b | [engine](../a/engine.json) | 8/7/1, tau 4 | 30.0 | 4.00 | 3.00 | 0.75 |"
    assert last_row([row]) == f"{eager}  |  |  |  |"
    assert last_row([row, also]) == f"{eager} 50.0 | 4.00 | 2.00 | 0.50 |"
