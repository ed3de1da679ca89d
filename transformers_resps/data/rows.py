"""Rows of a dataset, in the columns that TRL reads, as examples to learn from."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .conversations import Conversation, as_messages
from .examples import Example, make_example


Row = dict[str, Any]

_MASKS = ("assistant_masks", "completion_mask")


def column_kind(columns: Iterable[str], name: str) -> str:
    """Tell which columns of a dataset are read: `input_ids`, `messages`, `prompt` or `text`, in this order.

    Args:
        columns: those of the dataset.
        name: of the dataset, for the error.

    Raises:
        ValueError: there are none of these, or there are prompts without completions.
    """
    found = set(columns)
    if "prompt" in found and "completion" not in found and not found & {"input_ids", "messages"}:
        raise ValueError(
            f"`{name}` has the column `prompt` without `completion`, but a head learns from answers. Let the target "
            "write them (training/generate_dataset.py)."
        )
    for kind in ("input_ids", "messages", "prompt", "text"):
        if kind in found:
            return kind
    raise ValueError(
        f"`{name}` has the columns {sorted(found)}, but needs `messages`, `prompt` and `completion`, `text`, or "
        "`input_ids` with `assistant_masks` or `completion_mask`. Rename its columns."
    )


def example_of(
    row: Row, kind: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int
) -> tuple[Example, bool]:
    """Make the example of one row.

    `messages`, and lists of messages in `prompt` and `completion`, get the chat template; strings are taken as they
    are. The assistant's tokens are learned from, of `prompt` and `completion` only the completion's, of `text` all.

    Args:
        row: by column.
        kind: from `column_kind`.
        tokenizer: the target's; not needed for `input_ids`.
        max_length: in tokens; a longer text is cut.

    Returns:
        The example, whose mask may be empty; and whether only its first answer is used, as where the chat template
        rewrites earlier turns.

    Raises:
        ValueError: a column holds something else.
    """
    if kind == "input_ids":
        return _tokenized(row, max_length), False
    assert tokenizer is not None
    if kind == "messages":
        return _conversation(as_messages(row["messages"], None), tokenizer, max_length, _template(row))
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


def question_of(row: Row, kind: str) -> str | None:
    """The first user turn of a row, or its prompt as it is; `None` where there is none."""
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


def _conversation(
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


def _as_long_as(row: Row, column: str, test: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    values = _integers(row[column], column)
    if len(values) != len(row["input_ids"]):
        raise ValueError(f"has {len(row['input_ids'])} `input_ids`, but {len(values)} `{column}`.")
    return test(values)


def _integers(values: Any, column: str = "input_ids") -> torch.Tensor:
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
