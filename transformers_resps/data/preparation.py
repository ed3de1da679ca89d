"""Turn a dataset in TRL's columns into token ids, and a mask over the tokens that a head learns from.

Transformers and TRL find the assistant's tokens by `{% generation %}` marks in the chat template. Most templates have
none, so here they are what an assistant turn adds to the rendered text. `datasets` does the caching and the progress
bars; it is of the extra `train`, so it is imported where it is needed.
"""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .conversations import Conversation, as_messages


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(f"transformers.{__name__}")

Row = dict[str, Any]

PREPARED = ("input_ids", "loss_mask", "length", "question", "is_shortened")
_KINDS = ("input_ids", "messages", "prompt", "text")
_MASKS = ("assistant_masks", "completion_mask")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized sequence to train on."""

    input_ids: Tensor  # [t]
    loss_mask: Tensor  # [t] bool: tokens that the assistant wrote, its end-of-turn token included

    @classmethod
    def of_row(cls, row: Row) -> "Example":
        """From a row that `prepare_dataset` made."""
        return cls(torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"], dtype=torch.bool))

    @property
    def predicted(self) -> Tensor:
        """`[t]` bool: the assistant's tokens that a head can predict: all but those at the first two positions."""
        mask = self.loss_mask.clone()
        mask[:2] = False
        return mask

    @property
    def tensors(self) -> dict[str, Tensor]:
        """A row for `collate`: `input_ids` and `loss_mask` `[t]`, true for the tokens that a head can predict."""
        return {"input_ids": self.input_ids, "loss_mask": self.predicted}

    def check_ids(self, vocab_size: int, number: int) -> None:
        """Raise `ValueError`, which names example `number`, if it has no tokens, or other ids than the target's."""
        if not len(self.input_ids):
            raise ValueError(f"Text {number} has no tokens. Leave out empty texts.")
        odd = self.input_ids[(self.input_ids < 0) | (self.input_ids >= vocab_size)]
        if len(odd):
            raise ValueError(
                f"Text {number} holds token id {int(odd[0])}, but the target's vocabulary has {vocab_size} tokens. "
                "It was made with another model's tokenizer, or holds labels: tokenize it with the target's own."
            )


def make_example(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    learn_from: int = 0,
    **template: Any,
) -> Example:
    """Tokenize one conversation and mask the tokens that the assistant wrote.

    These are what an assistant turn adds to the rendered text after the generation prompt. Messages before the index
    `learn_from` are the prompt, and are not marked. A conversation of more than `max_length` tokens is cut. `template`
    are more arguments of the chat template, such as `tools`.

    Raises:
        ValueError: the chat template rewrites earlier turns, so the assistant's tokens cannot be found.
    """
    pieces: list[tuple[str, bool]] = []
    text = ""
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or index < learn_from:
            continue
        asked = _rendered(tokenizer, conversation[:index], add_generation_prompt=True, **template)
        answered = _rendered(tokenizer, conversation[: index + 1], add_generation_prompt=False, **template)
        if not asked.startswith(text) or not answered.startswith(asked):
            raise ValueError(
                f"The chat template does not render conversations turn by turn: turn {index + 1} changes the text "
                "before it. Pass a tokenizer with a template that only appends."
            )
        end = len(answered.rstrip("\n"))  # templates put a line break after the end-of-turn token
        pieces += [(asked[len(text) :], False), (answered[len(asked) : end], True)]
        text = answered[:end]
    ids: list[int] = []
    mask: list[bool] = []
    for piece, is_assistant in pieces:
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [is_assistant] * len(tokens)
        if len(ids) >= max_length:
            break
    return Example(torch.tensor(ids[:max_length]), torch.tensor(mask[:max_length]))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Conversation, **how: Any) -> str:
    rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    return str(rendered)


def prepare_dataset(
    dataset: "Dataset | IterableDataset",
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    vocab_size: int,
    num_proc: int | None = None,
) -> Any:
    """Tokenize a dataset, and leave out rows without a token to learn from.

    Of the columns `input_ids`, `messages`, `prompt` and `text` the first is read. `messages`, and lists of messages in
    `prompt` and `completion`, get the chat template; strings are taken as they are. Learned from are the assistant's
    tokens, of `prompt` and `completion` only the completion's, of `text` all.

    Args:
        dataset: with these columns. One that was prepared is returned as it is.
        name: of the dataset, for errors and the progress bar.
        tokenizer: the target's; not needed for `input_ids`.
        max_length: in tokens; longer sequences are cut.
        vocab_size: the target's vocabulary size.
        num_proc: processes that tokenize.

    Returns:
        A dataset of the same class: `input_ids`, `loss_mask` (what to learn from), `length` in tokens, `question` (the
        first user turn) and `is_shortened` (only the first answer is used, as where the chat template rewrites earlier
        turns). Iterable ones are prepared as they are read.

    Raises:
        ValueError: the dataset is empty, has other columns or content, was tokenized with another tokenizer, or
            has nothing to learn from.
    """
    import datasets

    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` is empty. Pass a split that has rows, or another dataset.")
    if set(first) == set(PREPARED):
        return dataset
    kind = _kind_of(first, name)
    if kind != "input_ids" and tokenizer is None:
        raise ValueError(
            f"`{name}` has the column `{kind}`, but there is no tokenizer for it where the target came from. Pass the "
            "target's as `processing_class`."
        )
    how = {"kind": kind, "name": name, "tokenizer": tokenizer, "max_length": max_length, "vocab_size": vocab_size}
    given: Any = {"batched": True, "with_indices": True, "remove_columns": list(first), "fn_kwargs": how}
    given["features"] = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "loss_mask": datasets.List(datasets.Value("bool")),
            "length": datasets.Value("int64"),
            "question": datasets.Value("string"),
            "is_shortened": datasets.Value("bool"),
        }
    )
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(_prepared_batch, **given)
    prepared = dataset.map(_prepared_batch, num_proc=num_proc, desc=f"Tokenizing {name}", **given)
    _check_prepared(prepared, len(dataset), name, max_length)
    return prepared


def _prepared_batch(
    batch: dict[str, list[Any]],
    numbers: Iterable[int],
    kind: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    vocab_size: int,
) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {column: [] for column in PREPARED}
    for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
        row = dict(zip(batch, values, strict=True))
        try:
            example, is_shortened = _example_of(row, kind, tokenizer, max_length)
            question = _question_of(row, kind)
        except ValueError as error:
            raise ValueError(f"Row {number} of `{name}`: {error}") from None
        if not example.predicted.any():
            continue
        example.check_ids(vocab_size, number)
        found = (example.input_ids.tolist(), example.loss_mask.tolist(), len(example.input_ids))
        for column, value in zip(PREPARED, (*found, question, is_shortened), strict=True):
            made[column].append(value)
    return made


def _check_prepared(prepared: "Dataset", rows: int, name: str, max_length: int) -> None:
    if not len(prepared):
        raise ValueError(
            f"None of the {rows} rows of `{name}` has an assistant turn, or a completion, that begins within "
            f"`max_length={max_length}` tokens. Pass texts with answers, or raise `max_length`."
        )
    if dropped := rows - len(prepared):
        logger.warning(
            "%d of %d rows of `%s` have no assistant turn, or completion, that begins within %d tokens: they are left "
            "out.",
            dropped,
            rows,
            name,
            max_length,
        )
    if shortened := sum(prepared["is_shortened"]):
        logger.warning(
            "The chat template rewrites earlier turns in %d of %d conversations of `%s`: only their first answers are "
            "used.",
            shortened,
            rows,
            name,
        )


def _kind_of(columns: Iterable[str], name: str) -> str:
    """The column that is read."""
    found = set(columns)
    if "prompt" in found and "completion" not in found and not found & {"input_ids", "messages"}:
        raise ValueError(
            f"`{name}` has the column `prompt` without `completion`, but a head learns from answers. Let the target "
            "write them with `generate`."
        )
    for kind in _KINDS:
        if kind in found:
            return kind
    raise ValueError(
        f"`{name}` has the columns {sorted(found)}, but needs `messages`, `prompt` and `completion`, `text`, or "
        "`input_ids` with `assistant_masks` or `completion_mask`. Rename its columns."
    )


def _example_of(
    row: Row, kind: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int
) -> tuple[Example, bool]:
    """The example of a row, perhaps with nothing to learn from, and whether only its first answer is used."""
    if kind == "input_ids":
        return _tokenized(row, max_length), False
    assert tokenizer is not None
    if kind == "messages":
        return _of_messages(as_messages(row["messages"], None), tokenizer, max_length, _template(row))
    if kind == "text":
        ids = _ids(row["text"], "text", tokenizer)[:max_length]
        return Example(_integers(ids), torch.ones(len(ids), dtype=torch.bool)), False
    if isinstance(row["prompt"], str):
        asked = _ids(row["prompt"], "prompt", tokenizer)
        answered = _ids(row["completion"], "completion", tokenizer, add_special_tokens=False)
        ids = (asked + answered)[:max_length]
        return Example(_integers(ids), torch.arange(len(ids)) >= len(asked)), False
    prompt, completion = (as_messages(row[column], None) for column in ("prompt", "completion"))
    conversation, begins = prompt + completion, len(prompt)
    return make_example(conversation, tokenizer, max_length, learn_from=begins, **_template(row)), False


def _question_of(row: Row, kind: str) -> str | None:
    """The first user turn of a row, or its prompt as it is."""
    asked = row.get(kind)
    if kind == "prompt" and isinstance(asked, str):
        return asked
    if kind not in ("messages", "prompt"):
        return None
    return next((turn["content"] for turn in as_messages(asked, None) if turn["role"] == "user"), None)


def _template(row: Row) -> Row:
    """What TRL's columns `tools` and `chat_template_kwargs` give to the chat template."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**({"tools": tools} if tools else {}), **(row.get("chat_template_kwargs") or {})}


def _of_messages(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int, template: Row
) -> tuple[Example, bool]:
    """Assistant turns before the first user turn are left out."""
    roles = [message["role"] for message in conversation]
    first = roles.index("user") if "user" in roles else len(roles)
    asked = [turn for turn in conversation[:first] if turn["role"] != "assistant"] + conversation[first:]
    try:
        return make_example(asked, tokenizer, max_length, **template), False
    except ValueError:
        answer = next(i for i, turn in enumerate(asked) if turn["role"] == "assistant")
        if answer + 1 == len(asked):
            raise
        return make_example(asked[: answer + 1], tokenizer, max_length, **template), True


def _tokenized(row: Row, max_length: int) -> Example:
    ids = _integers(row["input_ids"], "input_ids")[:max_length]
    mask = torch.ones(len(ids), dtype=torch.bool)
    for column in _MASKS:
        if row.get(column) is not None:
            mask &= _as_long_as(row, column, lambda values: values != 0)[:max_length]
    if row.get("labels") is not None:
        mask &= _as_long_as(row, "labels", lambda values: values >= 0)[:max_length]
    return Example(ids, mask)


def _as_long_as(row: Row, column: str, test: Callable[[Tensor], Tensor]) -> Tensor:
    values = _integers(row[column], column)
    if len(values) != len(row["input_ids"]):
        raise ValueError(f"has {len(row['input_ids'])} `input_ids`, but {len(values)} `{column}`.")
    return test(values)


def _integers(values: Any, column: str = "input_ids") -> Tensor:
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(1, 1)
    if found.ndim != 1 or (found.is_floating_point() and len(found)):
        raise ValueError(f"has `{column}` that are {str(values)[:60]}, but they must be a list of integers.")
    return found.long()


def _ids(text: Any, column: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True) -> list[int]:
    if not isinstance(text, str):
        raise ValueError(f"has the {column} {str(text)[:60]}, but it must be a string, or both lists of messages.")
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return ids
