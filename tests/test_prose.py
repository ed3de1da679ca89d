"""Pages, docstrings and comments are plain, and cite nothing that a reader cannot open; pages are short."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
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
MEASURED, MAX_LINES_OF_MEASURED = "benchmarks.md", 190  # written from results files, for two processors a table each
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
COMMIT = list(FORBIDDEN)[-1]
FILES = sorted((ROOT / "transformers_resps").rglob("*.py"))
MAX_RIDDLES = 0  # of the whole package; may only fall
# Beginnings of a docstring whose first word is neither a verb nor the thing.
RIDDLE_BEGINS = re.compile(r"As `|Likewise|Of |What |Those |Stands for ")
# Relative clauses without a noun, and a verb that needs one.
RIDDLE = re.compile(
    r"\b(of which|those that|as it is|as they are|[Ss]tands for|tells (?:of|what|whether|how|which|when))\b"
)


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


@cache
def docstrings(file: Path) -> list[tuple[int, str]]:
    """Line and text of each docstring of a file."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, documented)]
    return [(getattr(node, "lineno", 1), text) for node in nodes if (text := ast.get_docstring(node))]


def comments(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each comment of a file."""
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def riddles(file: Path) -> Iterator[str]:
    """`file:line: words` for each docstring or comment that needs a second reading by its form."""
    where = file.relative_to(ROOT)
    for line, text in docstrings(file):
        if begins := RIDDLE_BEGINS.match(text):
            yield f"{where}:{line}: {begins[0]}"
    for line, text in [*docstrings(file), *comments(file)]:
        yield from (f"{where}:{line}: {match[0]}" for match in RIDDLE.finditer(prose(text)))


def test_the_riddles_of_the_package_only_fall() -> None:
    found = [riddle for file in FILES for riddle in riddles(file)]
    assert len(found) <= MAX_RIDDLES, "\n".join(found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_code_cites_only_what_a_reader_can_open(file: Path) -> None:
    for line, text in [*docstrings(file), *comments(file)]:
        assert not re.search(rf"(?<![./]){COMMIT}", prose(text)), f"{file}, line {line}: a commit hash"
        for study in re.findall(r"the study `(\w+)`", text):
            assert (STUDIES / f"{study}.py").exists(), f"{file}, line {line}: the study {study} is not there"
        for path in re.findall(r"\b(?:docs|training|examples|model_cards|tests)/[\w./-]+\.(?:md|py|json|sh)\b", text):
            assert (ROOT / path).exists(), f"{file}, line {line}: {path} is not there"
