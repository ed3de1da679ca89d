"""`make evidence` measures what is missing, keeps what is valid, and tells what has drifted."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.evidence import __main__ as command
from training.evidence.experiments import AUTO, PLAIN, STOCK, experiments
from training.evidence.page import REASONS
from training.evidence.sealed import Version

from .files import CODE, DISTURBED, DRIFTED, ZEN, machine, rows_of, write, write_all


NAME = "other-domain"
NOW = Version("0.1.0", CODE[:12])
BEFORE = {"code": {"code_sha256": "beef" * 16}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "measured" / NOW.folder / "zen"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(Version, "here", lambda: NOW)
    monkeypatch.setattr(command, "device_name", lambda device: "Zen")
    folders = {"--measured": tmp_path / "measured", "--work": tmp_path / "work", "--page": tmp_path / "page.md"}
    return [part for name, folder in folders.items() for part in (name, str(folder))] + ["--only", NAME]


def test_only_what_is_missing_of_this_version_is_measured_each_in_a_process_of_its_own(
    tmp_path: Path, folder: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path / "measured" / "before", NAME, {PLAIN: 2.0}, **BEFORE)
    write(folder, NAME, 0, quiet=DRIFTED)
    write(folder, NAME, 1, quiet=DISTURBED)
    started: list[list[str]] = []

    def run(arguments: list[str], check: bool) -> SimpleNamespace:
        started.append(arguments[-2:])
        write(folder, NAME, int(arguments[-1]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert command.main(given) == 0 and started == [[NAME, "1"]]
    assert command.main(given) == 0 and len(started) == 1
    page = (tmp_path / "page.md").read_text()
    assert "| 2.00 (2.00 to 2.00) |" in page and "| 1.00 (1.00 to 1.00) |" in page  # each in a table of its version


def test_docs_refuse_a_file_that_was_edited_by_name(
    folder: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(folder, NAME)
    file.write_text(file.read_text().replace('"process": 0', '"process": 1'))
    assert command.main([*given, "--render"]) == 2
    assert f"{NAME}-0.json was edited" in capsys.readouterr().err


def test_what_is_left_out_is_asked_for_once_and_the_page_says_why(
    tmp_path: Path, folder: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def run(arguments: list[str], check: bool) -> SimpleNamespace:
        started.append(arguments[-1])
        command.note_reason(folder, NAME, "no head was given")
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    assert command.main(given) == 1 and started == ["0"]
    assert json.loads((folder / REASONS).read_text()) == {NAME: "no head was given"}
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
    folder: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, NAME, 0)
    assert command.main([*given, "--list"]) == 1
    assert "1 of 2 processes missing, about" in capsys.readouterr().out
    assert command.main([*given[:-1], "nothing", "--list"]) == 2


Planted = dict[str, dict[str, float]]  # experiment -> arm -> seconds, where stock takes one
PUBLISHED: Planted = {"engines-smollm2": {PLAIN: 0.25, AUTO: 0.16}, "engines-qwen": {PLAIN: 0.34, AUTO: 0.15}}


class Drift:
    """`make evidence-drift` with planted clocks."""

    def __init__(self, tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.given = [*given[:-2], "--drift"]
        self.folder = tmp_path / "work" / "drift" / "measured" / NOW.folder / "zen"
        self.published, self.monkeypatch = tmp_path / "measured" / "before", monkeypatch

    def publish(self, **changes: Any) -> None:
        for name, seconds in PUBLISHED.items():
            for number in range(2):
                arms = experiments("drift")[0].arms
                rows = rows_of(arms, seconds, number=number)
                for row in rows:  # prompts gain differently
                    row["seconds"] *= 1.1 if row["prompt"] == "a/0" and row["arm"] != STOCK else 1.0
                write(self.published, name, number, rows=rows, arms=list(arms), **BEFORE, **changes)

    def status(self, planted: Planted, **changes: Any) -> int:
        def run(arguments: list[str], check: bool) -> SimpleNamespace:
            name = arguments[-2]
            if name not in planted:
                command.note_reason(self.folder, name, "no weights were given (`--qwen`)")
                return SimpleNamespace(returncode=3)
            [one] = [one for one in experiments("drift") if one.name == name]
            rows = rows_of(one.arms, planted[name])
            write(self.folder, name, 0, rows=rows, arms=list(one.arms), **changes)
            return SimpleNamespace(returncode=0)

        self.monkeypatch.setattr(subprocess, "run", run)
        return command.main(self.given)


@pytest.fixture
def drift(tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch) -> Drift:
    return Drift(tmp_path, given, monkeypatch)


def test_ratios_within_their_intervals_hold_for_this_version_too(
    drift: Drift, capsys: pytest.CaptureFixture[str]
) -> None:
    drift.publish()
    assert drift.status({name: {arm: 1.02 * s for arm, s in own.items()} for name, own in PUBLISHED.items()}) == 0
    told = capsys.readouterr().out
    assert told.count(": held\n") == 4 and "the page stands for this version, too" in told
    assert f"version {NOW}" in told and "published of 0.1.0 (code beefbeefbeef)" in told


def test_only_a_ratio_beyond_its_interval_is_to_be_measured_anew(
    drift: Drift, capsys: pytest.CaptureFixture[str]
) -> None:
    drift.publish()
    planted = {**PUBLISHED, "engines-qwen": {PLAIN: 0.345, AUTO: 0.2}}
    assert drift.status({name: {arm: 1.02 * s for arm, s in own.items()} for name, own in planted.items()}) == 1
    told = capsys.readouterr().out
    assert told.count("MOVED") == 1 and told.count(": held\n") == 3
    assert 'EVIDENCE_OPTIONS="--only engines-qwen"' in told and "Qwen, compiled `auto`" in told


def test_a_processor_without_published_figures_is_named_and_told_what_was_measured(
    drift: Drift, capsys: pytest.CaptureFixture[str]
) -> None:
    drift.publish(machine=machine("Another, AVX2"))
    assert drift.status(PUBLISHED) == 3
    told = capsys.readouterr().out
    assert f"No figures of {ZEN} are published" in told and "SmolLM2, compiled plain over stock: 4.00 now" in told
    assert told.count("not published for this processor") == 4


def test_what_could_not_be_measured_is_no_all_clear(drift: Drift, capsys: pytest.CaptureFixture[str]) -> None:
    drift.publish()
    assert drift.status({"engines-smollm2": {PLAIN: 0.255, AUTO: 0.163}}) == 3
    told = capsys.readouterr().out
    assert told.count("not measured: no weights were given (`--qwen`)") == 2 and told.count(": held\n") == 2
    assert drift.status({"engines-smollm2": {PLAIN: 0.255, AUTO: 0.163}}, quiet=DISTURBED) == 3
    assert "not quiet: others used 0.30 processors during it" in capsys.readouterr().out
