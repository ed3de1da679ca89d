"""Write the pages as a site with search, which needs no network: `make site`, then open site/html/index.html.

The pages and all files that they link are laid into site/pages, in the places that they have in the repository: so
links lead where they lead there. The API reference is rendered for the site alone.
"""

import re
import shutil
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
SITE = ROOT / "site"
HOME = "README"
API = "docs/api"
SECTIONS = {
    "Use it": [
        "docs/get-started",
        "docs/which-drafter",
        "docs/coming-from",
        "docs/models",
        "docs/choose-a-policy",
        "docs/read-a-report",
        "docs/performance",
        "docs/lossless",
        "docs/same-text",
        "docs/grammars",
        "docs/trl",
        "docs/serve",
        "docs/limits",
        "docs/commands",
        "docs/glossary",
    ],
    "Make your own": ["docs/train-a-head", "docs/train-on-images", "docs/tune-a-policy", "training/PUBLISHING"],
    "Results": [
        "docs/benchmarks",
        "training/PROTOCOL",
        "training/studies/BENCHMARKS",
        "training/studies/HEADROOM",
        "training/studies/LOG",
        "training/benchmarking/RESULTS",
    ],
    "Reference": [API, "CONTRIBUTING", "CHANGELOG"],
}
SETTINGS = {
    "project": "transformers-resps",
    "root_doc": HOME,
    "extensions": ["myst_parser"],
    "myst_heading_anchors": 4,
    "html_theme": "furo",
    "html_title": "transformers-resps",
    "html_show_sphinx": False,
    "html_show_copyright": False,
    "html_copy_source": False,
}
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def pages() -> set[Path]:
    """Those of the navigation that the repository has, by their paths there."""
    named = {HOME, *(page for pages in SECTIONS.values() for page in pages)}
    return {Path(f"{name}.md") for name in named - {API}}


def linked(page: Path) -> set[Path]:
    """The files that a page links, but for other pages."""
    links = [link for link in _LINK.findall((ROOT / page).read_text(encoding="utf-8")) if "://" not in link]
    files = {(ROOT / page.parent / link).resolve() for link in links}
    return {file.relative_to(ROOT.resolve()) for file in files if file.is_file()} - pages()


def lay(folder: Path) -> None:
    """Copy pages and linked files, render the reference, and give the first page the navigation."""
    from make_api import render  # the extra `site`

    shutil.rmtree(folder, ignore_errors=True)
    for file in pages().union(*map(linked, pages())):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    (folder / f"{API}.md").write_text(render(), encoding="utf-8")
    trees = (
        f"```{{toctree}}\n:hidden:\n:caption: {name}\n\n" + "\n".join(named) + "\n```\n"
        for name, named in SECTIONS.items()
    )
    with (folder / f"{HOME}.md").open("a", encoding="utf-8") as home:
        home.write("\n" + "\n".join(trees))


def main() -> int:
    from sphinx.application import Sphinx  # the extra `site`

    lay(SITE / "pages")
    out = SITE / "html"
    app = Sphinx(SITE / "pages", None, out, SITE / "kept", "html", SETTINGS, warningiserror=True)
    app.build(force_all=True)
    (out / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={HOME}.html">\n', encoding="utf-8")
    return int(app.statuscode)


if __name__ == "__main__":
    sys.exit(main())
