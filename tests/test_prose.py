"""The pages are short, plain, and cite nothing that a reader cannot open."""

import re
from pathlib import Path

import pytest

from tests.readme import README


ROOT = README.parent
STUDIES = ROOT / "training" / "studies"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", STUDIES / "HEADROOM.md"]
PAGES += [STUDIES / "LOG.md", STUDIES / "BENCHMARKS.md", ROOT / "training" / "benchmarking" / "RESULTS.md"]
PAGES += [ROOT / "training" / name for name in ("PUBLISHING.md", "PROTOCOL.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PAGES += sorted((ROOT / "model_cards").glob("*/README.md"))
MAX_WORDS_OF_DOCS = 11_870  # a cell of a table may hold a hundred
MEASURED, MAX_LINES_OF_MEASURED = "benchmarks.md", 110  # written from results files, a row for each that is there
MAX_WORDS = {"README.md": 900, "CHANGELOG.md": 850, "CONTRIBUTING.md": 1300}
# Words of ours -> the word that a reader knows.
FORBIDDEN = {
    r"\bbehind\b": "after",
    r"\bdear(er|est)?\b": "expensive",
    r"\brestless\b|\bloud(er|est)?\b": "noisy",
    r"\b(some|no)body\b": "the caller, the reader, or the passive",
    r"\bis thought to\b": "is assumed to",
    r"\d of plain\b|\bof plain decoding's\b": "1.2x plain",
    r"\bof ours\b": "our",
    r"without a word": "silently",
    r"\.\./shared|outside the project|\bin git at\b": "something that a reader can open",
    r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b": "no commit hash",
}


def prose(text: str) -> str:
    """Without blocks of code, code in lines, links' addresses and titles of papers."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)


def unplain(text: str) -> dict[str, str]:
    """What a page says in words of ours -> what to write instead."""
    said = prose(text)
    return {match[0]: better for pattern, better in FORBIDDEN.items() for match in re.finditer(pattern, said)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_in_plain_words(page: Path) -> None:
    assert not unplain(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MAX_WORDS)
def test_a_page_stays_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").split()) <= MAX_WORDS[name]


def test_the_docs_stay_short() -> None:
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != MEASURED]
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in pages) <= MAX_WORDS_OF_DOCS
    assert len((ROOT / "docs" / MEASURED).read_text(encoding="utf-8").splitlines()) <= MAX_LINES_OF_MEASURED


def test_a_picture_stays_light() -> None:
    pictures = [*(ROOT / "docs").glob("*.svg"), *(ROOT / "model_cards").glob("*/*.png")]
    assert pictures and all(picture.stat().st_size <= 150_000 for picture in pictures)


def test_the_first_page_names_no_script_and_no_measurement_of_ours() -> None:
    assert not re.findall(r"training/\S+\.py|measurements/\S+", README.read_text(encoding="utf-8"))
