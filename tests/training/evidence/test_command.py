"""`make evidence` measures what is missing, keeps what is valid, and `make docs` refuses what does not fit."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.evidence import __main__ as command
from training.evidence.page import REASONS

from .files import CODE, DRIFTED, write, write_all


NAME = "other-domain"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(command, "code", lambda: {"code_sha256": CODE})
    monkeypatch.setattr(command, "device_name", lambda device: "Zen")
    folders = {"--measured": tmp_path / "measured", "--work": tmp_path / "work", "--page": tmp_path / "page.md"}
    return [part for name, folder in folders.items() for part in (name, str(folder))] + ["--only", NAME]


def test_a_page_from_before_the_protocol_is_left_alone_and_any_other_is_made_of_its_files(
    tmp_path: Path, given: list[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Old\n")
    assert command.main([*given, "--render"]) == 0 and page.read_text() == "# Old\n"
    write_all(tmp_path / "measured" / "zen", NAME, {"plain": 2.0})
    page.write_text(f"<!-- evidence of code {CODE} -->\n")
    assert command.main([*given, "--render"]) == 0
    assert "| 2.00 (2.00 to 2.00) |" in page.read_text()


def test_docs_refuse_a_file_of_another_commit_by_name(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "measured" / "zen", NAME)
    (tmp_path / "page.md").write_text(f"<!-- evidence of code {'beef' * 16} -->\n")
    assert command.main([*given, "--render"]) == 2
    assert f"{NAME}-0.json was measured with the code of 1234" in capsys.readouterr().err


def test_a_run_beside_a_file_of_another_commit_ends_with_its_name(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "measured" / "zen", NAME, code={"commit": "1234", "dirty": False, "code_sha256": "beef" * 16})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert command.main(given) == 2
    assert f"make evidence: {tmp_path / 'measured' / 'zen' / NAME}-0.json was measured" in capsys.readouterr().err


def test_only_what_is_missing_is_measured_each_in_a_process_of_its_own(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "measured" / "zen", NAME, 0)
    write(tmp_path / "measured" / "zen", NAME, 1, quiet=DRIFTED)
    started: list[list[str]] = []

    def run(arguments: list[str], check: bool) -> SimpleNamespace:
        started.append(arguments[-2:])
        write(tmp_path / "measured" / "zen", NAME, int(arguments[-1]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert command.main(given) == 0 and started == [[NAME, "1"], [NAME, "2"]]
    assert command.main(given) == 0 and len(started) == 2


def test_what_is_left_out_is_asked_for_once_and_the_page_says_why(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def run(arguments: list[str], check: bool) -> SimpleNamespace:
        started.append(arguments[-1])
        command.note_reason(tmp_path / "measured" / "zen", NAME, "no head was given")
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    assert command.main(given) == 1 and started == ["0"]
    assert json.loads((tmp_path / "measured" / "zen" / REASONS).read_text()) == {NAME: "no head was given"}
    assert "| no head was given |" in (tmp_path / "page.md").read_text()


def test_a_process_that_fails_leaves_the_page_with_an_empty_cell(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert command.main(given) == 1
    assert f"{NAME}, process 0 ended with 1" in capsys.readouterr().err


def test_ctrl_c_in_a_process_stops_all(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=130))
    assert command.main(given) == 130


def test_a_list_tells_what_is_missing_and_how_long_it_takes(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "measured" / "zen", NAME, 0)
    assert command.main([*given, "--list"]) == 1
    assert "2 of 3 processes missing, about" in capsys.readouterr().out
    assert command.main([*given[:-1], "nothing", "--list"]) == 2
