"""What the package index shows of README.md, whose other files it lacks. All else stands in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup


RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")


def page_for_index(page: str, source: str | None, version: str) -> str:
    """Let relative links lead to the version's tag in the repository `source`; without one they become plain text."""

    def replaced(found: re.Match[str]) -> str:
        mark, text, to = found.groups()
        if source is None:
            return "" if mark else text
        return f"{mark}[{text}]({source}/{'raw' if mark else 'blob'}/v{version}/{to})"

    return RELATIVE_LINK.sub(replaced, page)


project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
setup(
    long_description=page_for_index(
        Path("README.md").read_text(encoding="utf-8"), project["urls"].get("Source"), project["version"]
    ),
    long_description_content_type="text/markdown",
)
