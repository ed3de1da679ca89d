"""Reads the conversations of a dataset, and turns them into prompts in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import Conversation, load_conversations, prompt_fingerprint, to_tokens


_MAX_ROWS = 20_000  # read of one dataset


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The user's turns of one conversation; the target answers them one after another.

    Attributes:
        name: `dataset/row`.
        opening: what stands before the first user turn, such as a system message.
        turns: what the user says. Answers of the dataset are not used: every turn follows the target's own ones.
    """

    name: str
    opening: Conversation
    turns: tuple[str, ...]

    @classmethod
    def of(cls, name: str, messages: Conversation) -> "Dialogue":
        """Take the user turns of `messages`. Raises ValueError when there is none."""
        users = [place for place, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise ValueError(f"{name} has no user turn. Remove that row, or give it `turns`, `messages` or `prompt`.")
        return cls(name, messages[: users[0]], tuple(messages[place]["content"] for place in users))

    def asked(self, answers: Sequence[str]) -> Conversation:
        """Return the conversation up to the turn after `answers`, one for each turn before it."""
        messages = [*self.opening]
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.turns[len(answers)]}]

    def prompt(self, tokenizer: Any, answers: Sequence[str] = ()) -> "Prompt":
        """Return the turn after `answers`, with all before it, in tokens."""
        return Prompt(self.name, to_tokens(self.asked(answers), tokenizer), len(answers) + 1)

    @property
    def fingerprint(self) -> str:
        """Hash of the first turn, by which a prompt is recognised."""
        return prompt_fingerprint(self.turns[0])


@dataclass(frozen=True, slots=True)
class Prompt:
    """A turn that is ready to be answered: `name` is `dataset/row`, `input_ids` is `[s]`."""

    name: str
    input_ids: Tensor
    turn: int = 1


def read_dialogues(source: str, split: str = "test") -> list[Dialogue]:
    """Read all conversations of a file, or of a split of a dataset of the Hub, in order.

    Raises:
        ValueError: it is not there, it is empty, or a row is no conversation.
    """
    name = Path(source).stem
    rows = islice(load_conversations(source, split), _MAX_ROWS)
    found = [Dialogue.of(f"{name}/{number}", messages) for number, messages in enumerate(rows)]
    if not found:
        raise ValueError(f"{source} has no rows. Pass a dataset with at least one.")
    return found


def spread(dialogues: Sequence[Dialogue], limit: int) -> list[Dialogue]:
    """Choose up to `limit` of them, evenly over the file."""
    count = min(limit, len(dialogues))
    return [dialogues[index * len(dialogues) // count] for index in range(count)]
