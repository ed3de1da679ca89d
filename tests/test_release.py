"""`make release` refuses by name, and its README leads nowhere dead; nothing is asked of a network here."""

import io
import runpy
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

from tests import release
from tests.readme import ROOT, shown_figures
from training.evidence.sealed import Version


VERSION = "3.1.0"
FILES = {
    "pyproject.toml": f'[project]\nname = "x"\nversion = "{VERSION}"\n',
    "CHANGELOG.md": f"# Changelog\n\n## {VERSION}, 2026-12-06\n",
    "CITATION.cff": f"version: {VERSION}\ndate-released: 2026-12-06\n",
    "README.md": "# x\n",
}
DEVELOPED = FILES["pyproject.toml"].replace(VERSION, "3.1.0.dev0")
BREAKS = {
    "a change without a commit": ({"README.md": "# y\n"}, False, "changes without a commit:  M README.md"),
    "a version of a developer": ({"pyproject.toml": DEVELOPED}, True, "The version is 3.1.0.dev0"),
    "no day": ({"CHANGELOG.md": f"## {VERSION}, not released yet\n"}, True, f'no "## {VERSION}, YYYY-MM-DD"'),
    "another citation": ({"CITATION.cff": FILES["CITATION.cff"].replace("3.1", "3.0")}, True, "CITATION.cff says 3.0"),
    "an index that is to come": ({"README.md": "not on PyPI yet\n"}, True, 'README.md says "not on PyPI yet"'),
}  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository that can be released."""
    release.git(tmp_path, "init", "--quiet")
    for name, value in (("user.name", "a"), ("user.email", "a@b.c")):
        release.git(tmp_path, "config", name, value)
    commit(tmp_path, FILES)
    return tmp_path


def commit(clone: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (clone / name).write_text(text)
    release.git(clone, "add", ".")
    release.git(clone, "commit", "--quiet", "--message", "x")


def test_a_clone_in_order_is_not_refused(clone: Path) -> None:
    assert list(release.refusals(clone)) == []


@pytest.mark.parametrize(("files", "is_committed", "said"), BREAKS.values(), ids=BREAKS)
def test_what_stands_in_the_way_is_named(clone: Path, files: dict[str, str], is_committed: bool, said: str) -> None:
    if is_committed:
        commit(clone, files)
    else:
        for name, text in files.items():
            (clone / name).write_text(text)
    found = list(release.refusals(clone))
    assert any(said in one for one in found), found


def test_a_version_that_has_a_tag_is_refused(clone: Path) -> None:
    release.git(clone, "tag", f"v{VERSION}")
    (found,) = release.refusals(clone)
    assert found.startswith(f"Version {VERSION} has a tag already")


def test_figures_of_another_version_are_refused_by_name_and_those_of_this_one_are_not() -> None:
    name, version = next(shown_figures())
    assert list(release.figures_of_others([(name, version)], version)) == []
    (found,) = release.figures_of_others([(name, version)], Version("9.9.9", "0" * 12))
    assert name in found and str(version) in found and "9.9.9" in found


@pytest.fixture
def page_for_index(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The function of setup.py, which builds nothing meanwhile."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    found: Callable[..., str] = runpy.run_path("setup.py")["page_for_index"]
    return found


def test_the_index_gets_links_into_the_repository_or_plain_text(page_for_index: Callable[..., str]) -> None:
    page = "See [the\nguide](docs/a.md#b), [here](#c), [PEP](https://x.org).\n![picture](docs/a.svg)\n"
    assert page_for_index(page, None, VERSION) == "See the\nguide, [here](#c), [PEP](https://x.org).\n\n"
    there = "https://github.com/o/r"
    assert page_for_index(page, there, VERSION) == (
        f"See [the\nguide]({there}/blob/v3.1.0/docs/a.md#b), [here](#c), "
        f"[PEP](https://x.org).\n![picture]({there}/raw/v3.1.0/docs/a.svg)\n"
    )


def built(dist: Path, page: str, *, more: str = "", licence: str = "LICENSE") -> Path:
    """A wheel and a source distribution in a folder, as small as they can be."""
    dist.mkdir()
    told = f"transformers_resps-{VERSION}.dist-info"
    with zipfile.ZipFile(dist / "x.whl", "w") as wheel:
        wheel.writestr(f"{told}/METADATA", f"Metadata-Version: 2.4\n\n{page}")
        for name in (f"{told}/licenses/{licence}", "transformers_resps/__init__.py", more):
            wheel.writestr(name, "") if name else None
    with tarfile.open(dist / "x.tar.gz", "w:gz") as source:
        for name in ("LICENSE", "setup.py", "model_cards/smollm2-135m-instruct-head/config.json"):
            source.addfile(tarfile.TarInfo(f"x-{VERSION}/{name}"), io.BytesIO())
    return dist


def test_built_files_are_refused_for_dead_links_strange_files_and_no_licence(
    tmp_path: Path, page_for_index: Callable[..., str]
) -> None:
    readme = page_for_index((ROOT / "README.md").read_text(encoding="utf-8"), None, VERSION)
    good = built(tmp_path / "good", readme)
    assert list(release.faults_of_built(good)) == []
    assert ">transformers-resps<" in (good / "README.html").read_text(encoding="utf-8")
    bad = built(tmp_path / "bad", "[guide](docs/a.md)", more="tests/test_x.py", licence="NOTICE")
    strange, licence, dead = release.faults_of_built(bad)
    assert "x.whl holds tests/test_x.py" in strange and "x.whl has no LICENSE" in licence and "docs/a.md" in dead


def test_licences_of_what_users_install_fit_or_are_left_to_a_person() -> None:
    project = release.project_of(ROOT)
    refused, untold = release.licences(project)
    assert refused == [] and "torch" not in untold and "transformers" not in untold
    wrong, _ = release.licences({**project, "dependencies": ["numpy"], "optional-dependencies": {}})
    assert wrong == []


def test_a_card_without_a_licence_is_named(tmp_path: Path) -> None:
    card = tmp_path / "model_cards" / "head" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("---\nlibrary_name: x\n---\n# x\n")
    assert [*release.cards_without_licence(tmp_path)] == [
        "model_cards/head/README.md names no license. Write it into `card` of the recipe."
    ]
    assert [*release.cards_without_licence(ROOT)] == []


def test_a_person_is_told_of_the_address_the_tag_and_every_folder_to_publish(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "model_cards" / "some-head").mkdir(parents=True)
    left = "\n".join(release.left_to_do(tmp_path, ["https://x.org"], ["torchao"]))
    for said in (
        "Source",
        "git tag v",
        "twine upload",
        "model_cards/some-head OWNER/some-head",
        "torchao",
        "https://x.org",
    ):
        assert said in left
