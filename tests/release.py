"""Whether this commit can be released, in refusals by name; then what a person still has to do. It uploads nothing.

    python -m tests.release               # the clone, in seconds, before the long checks
    python -m tests.release --built dist  # the files that `make build` made, and what is left to do

Exit status: 0; 1 when something stands in the way. Run by `make release`.
"""

import argparse
import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import yaml
from readme_renderer.markdown import render

from tests.readme import ROOT, shown_figures
from training.evidence.sealed import Version


PAGES = ("*.md", "docs/*.md", "training/**/*.md", "model_cards/*/README.md")
COMPATIBLE = re.compile(r"apache|\bmit\b|bsd|\bisc\b|mpl|mozilla|python software foundation|psf", re.IGNORECASE)
IN_WHEEL = re.compile(r"transformers_resps/|resps\.py$|transformers_resps-[^/]+\.dist-info/")
IN_SOURCE = re.compile(
    r"transformers_resps(\.egg-info)?/|model_cards/smollm2-135m-instruct-head/|"
    r"(resps\.py|setup\.(py|cfg)|pyproject\.toml|README\.md|LICENSE|MANIFEST\.in|PKG-INFO)$"
)


def project_of(root: Path) -> Any:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout


def refusals(root: Path) -> Iterator[str]:
    """What in the clone at `root` stands in the way of a release."""
    version = project_of(root)["version"]
    if changed := git(root, "status", "--porcelain").splitlines():
        yield f"The tree holds changes without a commit: {', '.join(changed[:5])}. Commit or remove them."
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"The version is {version}, but a release has three numbers. Write 1.2.3 into pyproject.toml."
    if git(root, "tag", "--list", f"v{version}"):
        yield f"Version {version} has a tag already: v{version}. Raise the version in pyproject.toml."
    heading = re.search(rf"^## {re.escape(version)}, (.+)$", (root / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    if heading is None or not is_date(heading[1]):
        yield f'CHANGELOG.md has no "## {version}, YYYY-MM-DD". Give its heading the day of the release.'
    cited = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    told = f"{cited.get('version')}, {cited.get('date-released')}"
    if heading is not None and told != heading[0].removeprefix("## "):
        yield f"CITATION.cff says {told}, but CHANGELOG.md {heading[0]}. Write the same `version` and `date-released`."
    if "not on PyPI yet" in (root / "README.md").read_text(encoding="utf-8"):
        yield 'README.md says "not on PyPI yet", which the index would show. Write `pip install transformers-resps`.'


def is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def figures_of_others(shown: Iterable[tuple[str, Version]], here: Version) -> Iterator[str]:
    """Name the figures of README that another version gave."""
    for name, version in shown:
        if version != here:
            yield (
                f"README.md shows {name} of version {version}, but this is {here}. "
                "Measure it with `make evidence`, or let its cells say that they are not measured."
            )


def dead_links(root: Path) -> tuple[list[str], list[str]]:
    """Ask for every outside link of the pages: what does not exist, and what did not answer."""
    texts = [file.read_text(encoding="utf-8") for pattern in PAGES for file in root.glob(pattern)]
    links = sorted({link for text in texts for link in re.findall(r"\]\((https?://[^)\s]+)\)", text)})
    with ThreadPoolExecutor(16) as threads:
        answers = list(zip(links, threads.map(answer_of, links), strict=True))
    gone = [
        f"A page leads to {link}, which does not exist. Mend the link."
        for link, status in answers
        if status in (404, 410)
    ]
    return gone, [link for link, status in answers if status is None]


def answer_of(link: str) -> int | None:
    """The status of a link; `None` where nobody answers."""
    try:
        with urlopen(Request(link, method="HEAD", headers={"User-Agent": "transformers-resps"}), timeout=20) as found:
            return int(found.status)
    except HTTPError as error:
        return error.code
    except (URLError, TimeoutError):
        return None


def faults_of_built(dist: Path) -> Iterator[str]:
    """What is wrong with the wheel and the source distribution in `dist`, as the index and a lawyer read them."""
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        (told,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        written = email.message_from_bytes(packed.read(told))
    with tarfile.open(source) as opened:
        held = [member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()]
    for file, found, wanted in ((wheel, names, IN_WHEEL), (source, held, IN_SOURCE)):
        if odd := [name for name in found if not wanted.match(name)]:
            yield f"{file.name} holds {', '.join(odd[:5])}, which no user needs. Leave it out in MANIFEST.in."
        if not any(name.rpartition("/")[2] == "LICENSE" for name in found):
            yield f"{file.name} has no LICENSE. Name it in `license-files` of pyproject.toml."
    page = render(written.get_payload(decode=True).decode()) or ""
    (dist / "README.html").write_text(page, encoding="utf-8")
    if lost := [
        link for link in re.findall(r'(?:href|src)="([^"]*)"', page) if not link.startswith(("https://", "#"))
    ]:
        yield f"The index would show links of README.md that lead nowhere: {', '.join(lost[:5])}. See setup.py."


def licences(project: Any) -> tuple[list[str], list[str]]:
    """Of what users install beside us: refusals, and the packages whose licence is not told."""
    extras = [
        one for name, needs in project["optional-dependencies"].items() if name not in ("dev", "site") for one in needs
    ]
    refused, untold = [], []
    for name in sorted(
        {re.split(r"[\[<>=;~ ]", need)[0] for need in (*project["dependencies"], *extras)} - {project["name"]}
    ):
        try:
            facts = metadata(name)
        except PackageNotFoundError:
            untold.append(name)
            continue
        classifiers = [one for one in facts.get_all("Classifier") or () if one.startswith("License")]
        said = " ".join(
            [facts.get("License-Expression") or "", (facts.get("License") or "")[:80], *classifiers]
        ).strip()
        if not said:
            untold.append(name)
        elif not COMPATIBLE.search(said):
            refused.append(f"{name} is under {said}, which may not fit Apache-2.0. Use another package.")
    return refused, untold


def cards_without_licence(root: Path) -> Iterator[str]:
    for card in sorted(root.glob("model_cards/*/README.md")):
        front = card.read_text(encoding="utf-8").split("---")[1]
        if not yaml.safe_load(front).get("license"):
            yield f"{card.relative_to(root)} names no license. Write it into `card` of the recipe."


def left_to_do(root: Path, unanswered: Iterable[str], untold: Iterable[str]) -> Iterator[str]:
    """What a person does who has the accounts."""
    project = project_of(root)
    version = project["version"]
    if "Source" not in project["urls"]:
        yield (
            'Say where the repository is: `"Source" = "https://..."` in [project.urls], then `make release` again. '
            "Until then README's relative links are plain text on the index."
        )
    yield "Read dist/README.html: so the index shows README.md."
    yield f"Tag this commit: git tag v{version}, and push it."
    yield "With an account and a token of PyPI: python -m twine upload dist/*.whl dist/*.tar.gz"
    for card in sorted(card.name for card in (root / "model_cards").iterdir()):
        yield f"With an account and a token of the Hub: python training/publish.py model_cards/{card} OWNER/{card}"
    yield from (f"Look up the licence of {name}: its package does not tell." for name in untold)
    yield from (f"Open {link}: it did not answer." for link in unanswered)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, metavar="DIST", help="folder of the wheel and the source distribution")
    args = parser.parse_args(arguments)
    gone, unanswered = dead_links(ROOT)
    refused, untold = licences(project_of(ROOT))
    found = [*refusals(ROOT), *figures_of_others(shown_figures(), Version.here())]
    found += [*gone, *refused, *cards_without_licence(ROOT)]
    found += faults_of_built(args.built) if args.built else ()
    for one in found:
        print(f"REFUSED  {one}")
    if args.built and not found:
        print("Everything was checked and nothing was uploaded. What is left to you:")
        for number, one in enumerate(left_to_do(ROOT, unanswered, untold), start=1):
            print(f"{number:3}. {one}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
