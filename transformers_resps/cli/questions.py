"""Questions for a target: turns of conversations, or built-in ones."""

from ..data import Conversation


# Fifty questions that any chat model answers at some length: every task with every subject.
_TASKS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "List five facts about {}.",
    "What is the history of {}?",
    "Compare {} fifty years ago and today.",
    "Write a Python function that prints a report about {}.",
    "Give step-by-step advice to someone new to {}.",
    "Summarise the main arguments for and against {}.",
    "Write a polite e-mail asking an expert about {}.",
    "Make a quiz of three questions about {}, with answers.",
)
_SUBJECTS = ("bicycles", "the ocean", "cooking", "public libraries", "numbers")


def up_to(conversation: Conversation, role: str) -> Conversation:
    """Cut a conversation after its first turn of `role`; empty when it has none."""
    roles = [message["role"] for message in conversation]
    return conversation[: roles.index(role) + 1] if role in roles else []


def default_questions(most: int) -> list[Conversation]:
    """Return up to fifty one-turn conversations."""
    texts = [task.format(subject) for subject in _SUBJECTS for task in _TASKS]
    return [[{"role": "user", "content": text}] for text in texts[:most]]
