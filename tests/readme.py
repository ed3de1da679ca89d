"""The README's quickstart, its code and the output that is printed under it; and the figures that it shows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.evidence.page import Found, published, read_tables
from training.evidence.sealed import Version


ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MEASURED = ROOT / "training" / "evidence" / "measured"
SPEEDS = "engines-smollm2"
GAINS = ("policy-smollm2-t0", "policy-qwen-t0", "policy-qwen-t1")  # of "auto" over the best fixed tree


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


def found_in(name: str, maker: str = "AMD") -> Found:
    """Return the newest figures of an experiment on a processor of this maker."""
    found = published(name, [table for table in read_tables(MEASURED) if table.processor.startswith(maker)])
    assert found is not None
    return found


def shown_figures() -> Iterator[tuple[str, Version]]:
    """Each experiment that the README shows, with its processor, and the version that gave its figures."""
    for name, maker in ((SPEEDS, "AMD"), (SPEEDS, "Intel"), *((name, "AMD") for name in GAINS)):
        first = found_in(name, maker).processes[0]
        yield f"{name} ({first.processor})", first.version
