"""Hold out conversations by their prompts."""

import hashlib
from collections.abc import Iterable

from .conversations import Conversation


def split_conversations(
    conversations: Iterable[Conversation], share: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Split conversations into those to train on and those held out.

    The first question alone decides: a conversation stays on its side when the dataset grows, and all answers to one
    question are on the same side.

    Args:
        conversations: all of them.
        share: about how much to hold out, 0 to 1.

    Returns:
        Those to train on, in their order, and those held out, in an order that does not depend on the dataset's.
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
    end = roles.index("assistant", roles.index("user")) if _is_answered(roles) else len(roles)
    asked = "\0".join(message["content"] for message in conversation[:end])
    return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:6]) / 2**48


def _is_answered(roles: list[str]) -> bool:
    return "user" in roles and "assistant" in roles[roles.index("user") :]
