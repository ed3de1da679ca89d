"""Store hashes of training prompts beside a head or policy, so that a benchmark can refuse these prompts."""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from ..hub.download import file_of


logger = logging.getLogger(f"transformers.{__name__}")

TRAINING_PROMPTS = "training_prompts.json"


def prompt_fingerprint(text: str) -> str:
    """Hash a user's first turn to 16 hexadecimal digits, ignoring differences in whitespace."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def write_training_prompts(folder: str | Path, texts: Iterable[str], *, earlier: Iterable[str] = ()) -> None:
    """Write hashes of `texts` (first user turns), and the hashes `earlier` of the head that training started from."""
    hashes = sorted({prompt_fingerprint(text) for text in texts}.union(earlier))
    text = json.dumps({"sha256_16": hashes}, separators=(",", ":"))
    (Path(folder) / TRAINING_PROMPTS).write_text(text, encoding="utf-8")


def read_training_prompts(folder: str | Path) -> set[str] | None:
    """Load the hashes in a folder; return `None` if their file is missing, raise `ValueError` if it is damaged."""
    file = Path(folder) / TRAINING_PROMPTS
    if not file.is_file():
        return None
    try:
        return {str(one) for one in json.loads(file.read_text(encoding="utf-8"))["sha256_16"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not what `write_training_prompts` writes ({error!r}). Write it again, or delete it."
        ) from error


def training_prompts_of(source: str) -> set[str] | None:
    """Load the hashes stored with the head or policy `source`, a folder or Hub id; if none, warn and return `None`."""
    file = file_of(source, TRAINING_PROMPTS)
    if file is None:
        danger = "it may have been trained on prompts that it will be measured on."
        logger.warning(f"{source} has no {TRAINING_PROMPTS}, so {danger}")
        return None
    return read_training_prompts(file.parent)
