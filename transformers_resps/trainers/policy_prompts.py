"""The prompts that a policy learns from: a dataset in TRL's columns, in tokens."""

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, tensor
from transformers import PreTrainedModel

from ..data import to_tokens
from ..data.conversations import as_messages
from .checks import check_dataset


@dataclass(frozen=True, slots=True)
class PolicyPrompts:
    """Distinct prompts, in the order of their dataset.

    Attributes:
        tokens: `[s]` each.
        first_questions: what the first user turns say, by which a benchmark recognises them.
    """

    tokens: list[Tensor]
    first_questions: set[str]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def names(self) -> list[str]:
        """A hash of each prompt."""
        return list(map(name_of, self.tokens))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.tokens))

    @classmethod
    def of(cls, dataset: Any, name: str, tokenizer: Any) -> "PolicyPrompts":
        """Read the prompts of a dataset.

        Args:
            dataset: a `datasets.Dataset` with a column `prompt` (a string, which is taken as it is, or messages) or
                `messages`. Of messages, all turns up to the last question are the prompt, in the chat template.
            name: of the argument, for errors.
            tokenizer: of the target.

        Raises:
            ValueError: it is something else, is empty, or a row holds something else.
        """
        _check(dataset, name)
        found: dict[str, Tensor] = {}
        questions = set()
        column = "prompt" if "prompt" in dataset.column_names else "messages"
        for number, row in enumerate(dataset):
            try:
                tokens, question = _read(row[column], column, tokenizer)
            except ValueError as error:
                raise ValueError(f"Row {number} of `{name}` {error}") from None
            found[name_of(tokens)] = tokens
            questions.add(question)
        return cls(list(found.values()), questions)

    def check_context(self, target: PreTrainedModel, max_completion_length: int, name: str) -> None:
        """Check that the longest prompt leaves room for its answer.

        Raises:
            ValueError: it does not.
        """
        context = getattr(target.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and self.longest + max_completion_length > context:
            raise ValueError(
                f"The longest prompt of `{name}` has {self.longest} tokens and its answer up to "
                f"{max_completion_length}, but the target reads at most {context} tokens. Leave longer prompts out, "
                "or lower `max_completion_length`."
            )


def name_of(tokens: Tensor) -> str:
    """A hash of token ids `[s]`."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def _check(dataset: Any, name: str) -> None:
    """Check that a dataset has rows, and prompts in them.

    Raises:
        ValueError: it has not.
    """
    check_dataset(dataset, name, may_stream=False)
    if not len(dataset):
        raise ValueError(f"`{name}` is empty. Pass a split that has rows, or another dataset.")
    if not {"prompt", "messages"} & set(dataset.column_names):
        raise ValueError(
            f"`{name}` has the columns {sorted(dataset.column_names)}, but needs `prompt` or `messages`. Rename one "
            "with `dataset.rename_column`."
        )


def _read(value: Any, column: str, tokenizer: Any) -> tuple[Tensor, str]:
    """A prompt in tokens `[s]`, and its first question.

    Raises:
        ValueError: says what it is instead.
    """
    if isinstance(value, str) and column == "prompt" and value.strip():
        return tensor(tokenizer(value)["input_ids"]), value
    messages = as_messages(value, None)
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise ValueError("has no turn of the user, so there is nothing to answer. Leave it out.")
    return to_tokens(messages[: asked[-1] + 1], tokenizer), messages[asked[0]]["content"]
