"""A results file that cannot stand in a table is refused by its name."""

from pathlib import Path

import pytest

from training.evidence.page import write_page
from training.evidence.sealed import Measured, UnfitResultsError, seal

from .files import CODE, DRIFTED, experiment, rows_of, write, write_all


NAME = "hard-drafters"


def page_of(folder: Path) -> str:
    write_page(folder / "page.md", folder / "measured", CODE, quick=False)
    return (folder / "page.md").read_text()


def test_a_whole_file_reads_as_it_was_written(tmp_path: Path) -> None:
    file = write(tmp_path, NAME)
    found = Measured.read(file)
    assert found.code == CODE and not found.reasons
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


def test_a_file_of_other_code_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "zen", NAME)
    other = {"code_sha256": "beef" * 16, "commit": "5678", "dirty": False}
    write(tmp_path / "measured" / "zen", NAME, 2, code=other)
    with pytest.raises(UnfitResultsError, match=rf"{NAME}-2\.json was measured with the code of 5678"):
        page_of(tmp_path)


def test_a_file_that_lacks_an_arm_is_refused_unless_it_says_why(tmp_path: Path) -> None:
    *some, last = experiment(NAME).arms
    write_all(tmp_path / "measured" / "zen", NAME, rows=rows_of(some, {}))
    with pytest.raises(UnfitResultsError, match=rf"{NAME}-0\.json lacks the arm {last}"):
        page_of(tmp_path)
    write_all(tmp_path / "measured" / "zen", NAME, rows=rows_of(some, {}), left_out={last: "no memory here"})
    assert f"Not measured: {last}: no memory here." in page_of(tmp_path)


def test_two_processors_in_one_row_are_refused(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "zen", NAME)
    write(tmp_path / "measured" / "zen", NAME, 1, machine={"device": "Intel Xeon, AMX"})
    with pytest.raises(UnfitResultsError, match=rf"{NAME}-1\.json of Intel Xeon, AMX, but they stand in one row"):
        page_of(tmp_path)


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


def test_a_run_is_judged_by_the_present_limits(tmp_path: Path) -> None:
    drifted = Measured.read(write(tmp_path, NAME, quiet=DRIFTED))
    assert drifted.reasons == ["the probes differ by 30%"]
    assert Measured.read(write(tmp_path, NAME, quiet=DRIFTED | {"after": [1.1] * 4})).reasons == []
