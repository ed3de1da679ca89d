"""Every study says what it asked and what came out, and starts; and every command that is written down exists."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
FILES = (ROOT / "training" / "studies").glob("*.py")
STUDIES = {file.stem: ast.get_docstring(ast.parse(file.read_text())) or "" for file in FILES}
COMMANDS = sorted(name for name, says in STUDIES.items() if "Question:" in says)
PAGES = [page for kind in ("docs/*.md", "training/**/*.py", "training/**/*.md") for page in ROOT.glob(kind)]
PAGES += (ROOT / "training" / "recipes").glob("*.yaml")
COMMAND = re.compile(r"\btraining/[\w/]+\.py|(?<=-m )training[\w.]+\w")
COMMANDS_WRITTEN = {command for page in PAGES for command in COMMAND.findall(page.read_text())}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_states_its_question_and_its_answer_or_of_which_it_is_a_part(name: str) -> None:
    says = STUDIES[name]
    if name in COMMANDS:
        assert re.search(r"Question: .*\?\nAnswer\b.*: .*\n\n +python -m training\.studies\.", says, re.DOTALL)
    else:
        whole = re.match(r"Part of the stud(?:y|ies) (.*?):", says)
        assert whole and set(re.findall(r"`(\w+)`", whole[1])) <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_study_starts(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"training.studies.{name}", raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"training.studies.{name}", run_name="__main__")
    assert "Question:" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS_WRITTEN))
def test_a_command_that_is_written_down_exists(command: str) -> None:
    file = ROOT / command.replace(".py", "").replace(".", "/")
    assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()
