"""Push what an object saves, with a minimal card."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .metadata import GENERAL_TAGS, as_hub_id, card_data
from .upload import Destination, Existing, upload


# What publishing puts beside weights and describes them.
CARD, RESULTS, METRICS = "README.md", "results.json", "metrics.json"


def push_saved(save: Callable[[Path], Any], card: str, destination: Destination, message: str) -> str:
    """Upload what `save` writes into a folder, and `card` where the repository has none.

    A repository with figures of other weights is refused, not cleared: it may hold their only copy.

    Returns:
        The address of the commit.

    Raises:
        OSError, ConnectionError, ValueError: as `upload`.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        files: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.iterdir())}
        return upload(
            {CARD: card.encode(), **files}, destination, message, existing=Existing((CARD,), (RESULTS, METRICS))
        )


def plain_card(kind: str, tag: str, target: str | None, use: str) -> str:
    """A card without results: metadata for the target's page, what it is, and a line to load it.

    Args:
        kind: in words, as "draft head".
        tag: the same as a tag.
        target: the target's name.
        use: the line of Python.
    """
    hub_id = as_hub_id(target)
    of = f" for {hub_id}" if hub_id else ""
    return (
        f"---\n{card_data(hub_id, ['eagle3', tag, *GENERAL_TAGS]).to_yaml()}\n---\n\n# A {kind}{of}\n\n"
        f"```python\n{use}\n```\n\nNothing was measured for this card.\n"
    )
