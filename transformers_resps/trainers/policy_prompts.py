"""The prompts that a policy learns from: a dataset in TRL's columns, in tokens."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, tensor
from transformers import PreTrainedModel

from ..data import to_tokens


_REMEDY = 'Make one with `Dataset.from_list([{"prompt": "..."}])` or `load_dataset(..., split="train")`.'


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
        rows = _checked(dataset, name)
        found: dict[str, Tensor] = {}
        questions = set()
        column = "prompt" if "prompt" in dataset.column_names else "messages"
        for number, row in enumerate(rows):
            tokens, question = _read(row[column], column, tokenizer, f"Row {number} of `{name}`")
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


def _checked(dataset: Any, name: str) -> Any:
    """The dataset, if it is one of prompts.

    Raises:
        ValueError: it is not.
    """
    import datasets

    if isinstance(dataset, Mapping):  # also a `DatasetDict`
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__} of the splits {', '.join(map(str, dataset))}, but a policy is "
            f"trained on one. Pass for example `dataset[{next(iter(dataset), 'train')!r}]`."
        )
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            f"`{name}` is an `IterableDataset`, but a policy learns from a few prompts many times. Take the first n: "
            "`Dataset.from_list(list(dataset.take(200)))`."
        )
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"`{name}` is a {type(dataset).__name__}, but must be a `datasets.Dataset`. {_REMEDY}")
    if not len(dataset):
        raise ValueError(f"`{name}` has no rows, but a policy learns from prompts. {_REMEDY}")
    if not {"prompt", "messages"} & set(dataset.column_names):
        raise ValueError(
            f"`{name}` has the columns {', '.join(dataset.column_names)}, but needs `prompt` or `messages`. Rename "
            "one with `dataset.rename_column`."
        )
    return dataset


def _read(value: Any, column: str, tokenizer: Any, where: str) -> tuple[Tensor, str]:
    """A prompt in tokens `[s]`, and its first question."""
    if isinstance(value, str) and column == "prompt" and value.strip():
        return tensor(tokenizer(value)["input_ids"]), value
    if not isinstance(value, list) or not all(map(_is_message, value)):
        kinds = "a string or a list of messages" if column == "prompt" else "a list of messages"
        raise ValueError(
            f"{where} has {str(value)[:60]!r} as `{column}`, but it must be {kinds}, each "
            '`{"role": "user", "content": "..."}`.'
        )
    asked = [place for place, message in enumerate(value) if message["role"] == "user"]
    if not asked:
        raise ValueError(f"{where} has no turn of the user, so there is nothing to answer. Leave it out.")
    return to_tokens(value[: asked[-1] + 1], tokenizer), str(value[asked[0]]["content"])


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
