"""What GitHub, pre-commit and citation tools read: valid, and in step with the project."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.readme import README


ROOT = README.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(file: Path | str) -> Any:
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def test_the_workflow_runs_what_a_contributor_can_run_on_the_lowest_python() -> None:
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert [step["with"]["python-version"] for step in job["steps"] if "with" in step] == [lowest]


def hooks() -> dict[str, dict[str, Any]]:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    return {hook["id"]: hook for hook in repository["hooks"]}


def test_a_commit_runs_the_tools_of_make_lint() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    tools = re.findall(r"-m (\w+(?: format| check)?)", recipe[1])
    assert [re.findall(r"-m (\w+(?: format| check)?)", hook["entry"])[0] for hook in hooks().values()] == tools


def test_a_commit_checks_the_types_of_the_files_that_mypy_checks_and_of_no_others() -> None:
    settings = PROJECT["tool"]["mypy"]
    names = [*settings["packages"], *settings["modules"]]
    checked = re.compile(hooks()["mypy"]["files"])
    for file in (file.relative_to(ROOT) for file in ROOT.rglob("*.py") if ".venv" not in file.parts):
        module = ".".join(file.with_suffix("").parts).removeprefix(f"{settings['mypy_path']}.")
        is_checked = any(module == name or module.startswith(f"{name}.") for name in names)
        assert bool(checked.search(file.as_posix())) == is_checked, file


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_has_what_github_needs(form: Path) -> None:
    written = read(form)
    assert written["name"] and written["description"]
    fields = written["body"]
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)


def test_the_citation_names_the_project_and_the_papers_of_the_readme() -> None:
    citation = read("CITATION.cff")
    assert citation["title"] == PROJECT["project"]["name"] and citation["license"] == PROJECT["project"]["license"]
    papers = {paper["identifiers"][0]["value"].removeprefix("arXiv:"): paper for paper in citation["references"]}
    shown = README.read_text(encoding="utf-8")
    assert papers.keys() == set(re.findall(r"arxiv\.org/abs/([\d.]+)", shown))
    assert papers["2601.12212"]["title"] in shown
