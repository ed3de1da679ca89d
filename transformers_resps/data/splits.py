"""Prompts that are measured on are not trained on: held-out conversations, and hashes of the training prompts."""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from ..hub.download import file_of
from .conversations import Conversation


logger = logging.getLogger(f"transformers.{__name__}")

TRAINING_PROMPTS = "training_prompts.json"


def split_conversations(
    conversations: Iterable[Conversation], share: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Split conversations into those to train on, in their order, and those held out.

    About `share` of them, 0 to 1, are held out. The first question alone decides: a conversation stays on its side
    when the dataset grows, and all answers to one question are on the same side. Nor does the order of those held out
    depend on the dataset's.
    """
    training: list[Conversation] = []
    held_out: list[tuple[float, Conversation]] = []
    for conversation in conversations:
        place = _place(conversation)
        if place < share:
            held_out.append((place, conversation))
        else:
            training.append(conversation)
    return training, [conversation for _, conversation in sorted(held_out, key=lambda pair: pair[0])]


def _place(conversation: Conversation) -> float:
    """A number in [0, 1) that depends on what comes before the first answer alone."""
    roles = [message["role"] for message in conversation]
    is_answered = "user" in roles and "assistant" in roles[roles.index("user") :]
    end = roles.index("assistant", roles.index("user")) if is_answered else len(roles)
    asked = "\0".join(message["content"] for message in conversation[:end])
    return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:6]) / 2**48


def prompt_fingerprint(text: str) -> str:
    """A hash of a user's first turn, the same for any whitespace between its words."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def write_training_prompts(folder: str | Path, texts: Iterable[str], *, earlier: Iterable[str] = ()) -> None:
    """Write fingerprints of the first user turns that a head or policy learned from into its folder.

    `earlier` are those of the head that training started from.
    """
    hashes = sorted({prompt_fingerprint(text) for text in texts}.union(earlier))
    (Path(folder) / TRAINING_PROMPTS).write_text(
        json.dumps({"sha256_16": hashes}, separators=(",", ":")), encoding="utf-8"
    )


def read_training_prompts(folder: str | Path) -> set[str] | None:
    """The fingerprints in a folder, or `None`. Raises `ValueError` for what `write_training_prompts` did not write."""
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
    """The fingerprints of the prompts that a head or policy learned from; `None` and a warning if unknown.

    Raises `ValueError` when the file is damaged.
    """
    file = file_of(source, TRAINING_PROMPTS)
    if file is None:
        logger.warning(
            "%s has no %s, so it may have been trained on prompts that it will be measured on.",
            source,
            TRAINING_PROMPTS,
        )
        return None
    return read_training_prompts(file.parent)
