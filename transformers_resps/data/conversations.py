"""Read conversations from files in the usual layouts, as lists of `messages`.

Files are read without `datasets`, which refuses truncated downloads and is not part of the base install. ShareGPT's
roles ("human", "gpt") are renamed here, because TRL's `maybe_convert_to_chatml` does not rename them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


Conversation = list[dict[str, str]]

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "system": "system"}
_BETWEEN_ROWS = re.compile(r"[,\s]*")


def load_conversations(source: str | Path, split: str = "train") -> Iterator[Conversation]:
    """Yield the conversations in `source`, a file or a dataset; of a dataset only `split`, such as `train[:1000]`.

    A file is `.jsonl`, or `.json` with one list; if the list is truncated, its complete rows are read. A dataset is a
    Hub id, `owner/name` or `owner/name:config`, or a folder with the same layout. Each row must have `messages`;
    `prompt` and optionally `completion` (each a string or a list of messages); `turns` (user turns); `question` and
    optionally `answer`; or ShareGPT's `conversations`. Raises a `ValueError` if `source` is named like a file but does
    not exist or is no JSON in UTF-8, if a row has none of these or is not only text, or without `datasets`.
    """
    path = Path(source)
    read = _jsonl_rows if path.suffix == ".jsonl" else _json_list_rows
    rows = read(path) if path.is_file() else load_rows(source, split)
    for number, row in enumerate(rows):
        try:
            conversation = _messages(row)
        except ValueError as error:
            raise ValueError(f"{source}, row {number} {error} Fix or remove that row.") from None
        yield conversation


def load_rows(source: str | Path, split: str = "train") -> Any:
    """Load a file, or a `split` of a dataset, as a `datasets.Dataset`; for `source` see `load_conversations`."""
    is_file = Path(source).is_file()
    if not is_file and Path(source).suffix in (".json", ".jsonl"):
        raise ValueError(
            f"There is no file {source}. Pass the path of a JSON or JSONL file, or the id of a dataset on the Hub."
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{source} is no file, and datasets on the Hub need the package `datasets`. Install "
            "transformers-resps[train], or pass the path of a JSON or JSONL file."
        ) from error
    if is_file:
        return load_dataset("json", data_files=str(source), split="train")
    name, _, config = str(source).partition(":")
    return load_dataset(name, config or None, split=split)


def _jsonl_rows(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                why = getattr(error, "msg", None) or str(error)
                raise ValueError(
                    f"{path}, line {number} is not JSON in UTF-8 ({why}). Fix or remove that line."
                ) from error


def _json_list_rows(path: Path) -> Iterator[Any]:
    """Yield the complete rows of a JSON list, which may be a truncated download."""
    text = path.read_text(encoding="utf-8", errors="ignore").strip()
    if not text.startswith("["):
        raise ValueError(
            f"{path} does not begin with `[`, but a .json dataset must be one list of conversations. "
            "Fix it, or write one JSON object per line to a .jsonl file."
        )
    decoder, place = json.JSONDecoder(), 1
    while (place := _BETWEEN_ROWS.match(text, place).end()) < len(text) and text[place] != "]":  # type: ignore[union-attr]
        try:
            row, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            # A file is cut off if the error lies in a string without an end, or in the last word, such as `fals`
            if error.msg.startswith("Unterminated string") or error.pos >= len(text) - 6:
                return
            raise ValueError(
                f"{path} has a broken row: {error.msg} at {text[error.pos : error.pos + 20]!r}, before the end of the "
                "file. Fix that row."
            ) from error
        yield row


def _messages(row: Any) -> Conversation:
    if not isinstance(row, dict):
        raise ValueError(f"is {row!r}, but a conversation is a JSON object.")
    if "messages" in row:
        return as_messages(row["messages"], "user")
    if "conversations" in row:
        return _from_sharegpt(_objects(row["conversations"], "`conversations`"))
    if "turns" in row:
        if not isinstance(row["turns"], list):
            raise ValueError(f"has `turns` that are {row['turns']!r}, but they must be a list.")
        return [{"role": "user", "content": _text(turn)} for turn in row["turns"]]
    for question, answer in (("prompt", "completion"), ("question", "answer")):
        if question in row:
            asked, answered = as_messages(row[question], "user"), row.get(answer)
            return asked + ([] if answered is None else as_messages(answered, "assistant"))
    raise ValueError(
        f"has the fields {sorted(row)}, but a conversation needs `messages`, `prompt` (and `completion`), `turns`, "
        "`question` (and `answer`), or ShareGPT's `conversations`."
    )


def _from_sharegpt(turns: list[dict[str, Any]]) -> Conversation:
    if all("role" in turn for turn in turns):
        return as_messages(turns, "user")
    if not all({"from", "value"} <= set(turn) for turn in turns):
        raise ValueError("has `conversations` with turns that lack `from` or `value`.")
    known = [turn for turn in turns if str(turn["from"]) in _SHAREGPT_ROLES]
    return [{"role": _SHAREGPT_ROLES[turn["from"]], "content": _text(turn["value"])} for turn in known]


def as_messages(value: Any, role: str | None) -> Conversation:
    """Check and return a list of messages, or wrap a string as one message of `role`; raise `ValueError` if wrong."""
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    return [{"role": str(message["role"]), "content": _text(message["content"])} for message in _checked(value)]


def _checked(value: Any) -> list[dict[str, Any]]:
    messages = _objects(value, "messages")  # errors begin with "has": callers prepend the row's number
    for message in messages:
        if not {"role", "content"} <= set(message):
            raise ValueError(f"has a message with the fields {sorted(message)}, but it needs `role` and `content`.")
        if message.get("tool_calls"):
            raise ValueError("has a message with `tool_calls`, but only text can be trained on.")
    return messages


def with_images(value: Any, images: int) -> list[dict[str, Any]]:
    """Check messages as `as_messages` does, and split each content into text and image parts. If no part is an image,
    put `images` image parts before the text of the first user turn, as in TRL. Raises `ValueError` if a message is
    wrong, or if an assistant's turn has an image.
    """
    messages: list[dict[str, Any]] = [
        {"role": str(one["role"]), "content": _parts(one["content"], has_images=True)} for one in _checked(value)
    ]
    asked = next((message["content"] for message in messages if message["role"] == "user"), None)
    if asked is not None and not any(map(images_in, messages)):
        asked[:0] = [{"type": "image"}] * images
    if any(images_in(message) for message in messages if message["role"] == "assistant"):
        raise ValueError("has an assistant's turn with an image, but only the answers' text can be learned from.")
    return messages


def images_in(message: dict[str, Any]) -> int:
    """Count the image parts in a message's content."""
    return sum(part["type"] == "image" for part in message["content"] if isinstance(part, dict))


def text_of(content: str | list[dict[str, str]]) -> str:
    """Return a message's content as a string; if it is a list of parts, join their texts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _parts(content: Any, *, has_images: bool) -> list[dict[str, str]]:
    """Convert a string, number or list to text and, if `has_images`, image parts; raise `ValueError` otherwise."""
    if isinstance(content, (str, int, float)):
        return [{"type": "text", "text": str(content)}]
    parts = []
    for part in content if isinstance(content, list) else [content]:
        fields = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if has_images and fields == {"type": "image"}:
            parts.append({"type": "image"})
        elif isinstance(fields.get("text"), str):
            parts.append({"type": "text", "text": fields["text"]})
        else:
            raise ValueError(
                f"has the content {str(part)[:60]}, but only text can be trained on: a part must be text or the place "
                "of an image, `{'type': 'image'}`, where the dataset has a column `images`."
            )
    return parts


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError(f"has {name} that are {str(value)[:60]}, but they must be a list of JSON objects.")
    return value


def _text(content: Any) -> str:
    return text_of(_parts(content, has_images=False))


def to_tokens(messages: Conversation, tokenizer: Any) -> Tensor:
    """Tokenize a prompt to ids `[s]`: render it by the chat template or, without a template, one message per line."""
    if tokenizer.chat_template is None:
        return torch.tensor(tokenizer("\n".join(message["content"] for message in messages) + "\n")["input_ids"])
    return torch.tensor(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
