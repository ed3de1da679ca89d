"""The README's quickstart: its code, and the output that is printed under it."""

import re
from dataclasses import dataclass
from pathlib import Path


README = Path(__file__).parent.parent / "README.md"


@dataclass(frozen=True)
class Quickstart:
    """The first Python block, and the text block that follows it."""

    code: str
    output: str


def quickstart() -> Quickstart:
    """Those of the page as it is."""
    found = re.search(r"^```python\n(.*?)^```\n+```text\n(.*?)\n```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, "README.md has no Python block with its output in a text block below"
    return Quickstart(found[1], found[2])
