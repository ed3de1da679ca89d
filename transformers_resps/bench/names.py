"""Names a head or a policy by the folder or Hub id that it was loaded from."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath


# Folders of a training run that say what is in them, not whose it is.
_KINDS = re.compile(r"(head|policy)(-unfinished)?|checkpoint-\d+|model|\.|\.\.|")


def short_name(source: str) -> str:
    """The last part of a folder or Hub id; where that is only `head`, `policy` or a checkpoint, what stands before it.

    >>> short_name("runs/gsm8k/policy"), short_name("runs/chat"), short_name("you/head"), short_name("checkpoint-20")
    ('gsm8k', 'chat', 'you', 'checkpoint-20')
    """
    given = PurePath(source)
    parts = (Path(source).resolve() if Path(source).is_dir() else given).parts
    return next((part for part in reversed(parts) if not _KINDS.fullmatch(part)), given.name)


def distinct_names(sources: Sequence[str]) -> list[str]:
    """A name for each of `sources`, in their order: the short one, or the whole source where two have the same."""
    short = [short_name(source) for source in sources]
    counts = Counter(short)
    return [source.rstrip("/") if counts[name] > 1 else name for name, source in zip(short, sources, strict=True)]
