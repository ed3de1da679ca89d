"""A results file that cannot stand in a table is refused by its name."""

from pathlib import Path
from typing import Any

import pytest

from training.evidence.sealed import Measured, UnfitResultsError, Version, seal

from .files import CODE, experiment, machine, page_of, rows_of, write, write_all


NAME = "hard-drafters"


def test_a_whole_file_reads_as_it_was_written_and_says_its_version(tmp_path: Path) -> None:
    found = Measured.read(write(tmp_path, NAME))
    assert found.version == Version("0.1.0", CODE[:12]) and not found.watch.reasons
    assert found.data["rows"] == rows_of(experiment(NAME).arms, {})


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "zen", NAME)
    file = tmp_path / "measured" / "zen" / f"{NAME}-1.json"
    text = file.read_text()
    file.write_text(text.replace('"seconds":1.01', '"seconds":0.5', 1))
    assert file.read_text() != text
    with pytest.raises(UnfitResultsError, match=rf"{NAME}-1\.json was edited"):
        page_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", ""])
def test_what_is_no_results_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(UnfitResultsError, match=r"odd\.json is no results file"):
        Measured.read(tmp_path / "odd.json")


@pytest.mark.parametrize(
    "fields", [{"machine": machine(release="9.9.9")}, {"machine": {"device": "Zen"}}, {"code": {}}], ids=str
)
def test_a_file_of_an_unknown_version_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    write(tmp_path / "measured" / "zen", NAME, **fields)
    with pytest.raises(UnfitResultsError, match=rf"{NAME}-0\.json measured an unknown version"):
        page_of(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"code": {"code_sha256": "beef" * 16}}, r"version 0\.1\.0 \(code c0dec0dec0de\) and .*-1\.json of 0\.1\.0"),
        ({"machine": machine("Intel Xeon, AMX")}, r"and .*-1\.json of Intel Xeon, AMX"),
    ],
    ids=["version", "processor"],
)
def test_two_versions_or_processors_in_one_table_are_refused(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    write(tmp_path / "measured" / "zen", "budgets-smollm2")
    write(tmp_path / "measured" / "zen", NAME, 1, **fields)
    with pytest.raises(UnfitResultsError, match=f"{says}.* stand in one table"):
        page_of(tmp_path)


def test_a_file_that_lacks_an_arm_is_refused_unless_it_says_why(tmp_path: Path) -> None:
    *some, last = experiment(NAME).arms
    write_all(tmp_path / "measured" / "zen", NAME, rows=rows_of(some, {}))
    with pytest.raises(UnfitResultsError, match=rf"{NAME}-0\.json lacks answers of the arm {last}"):
        page_of(tmp_path)
    write_all(tmp_path / "measured" / "zen", NAME, rows=rows_of(experiment(NAME).arms, {})[:-1])
    with pytest.raises(UnfitResultsError, match=rf"lacks answers of the arm {last}"):
        page_of(tmp_path)
    write_all(tmp_path / "measured" / "zen", NAME, rows=rows_of(some, {}), left_out={last: "no memory here"})
    assert f"Not measured: {last}: no memory here." in page_of(tmp_path)


def test_files_of_other_prompts_or_weights_are_refused_in_one_row(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "zen", NAME)
    write(tmp_path / "measured" / "zen", NAME, 1, settings={"prompts": {"b/0": "ee"}})
    with pytest.raises(UnfitResultsError, match="differ in settings"):
        page_of(tmp_path)


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    file = write(tmp_path, NAME)
    before = file.read_text()
    with pytest.raises(TypeError):
        seal(file, {"rows": object()})
    assert file.read_text() == before
