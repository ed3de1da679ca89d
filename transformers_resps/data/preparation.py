"""Turn a dataset with TRL's columns into token ids, and a mask of the tokens that a head learns to predict.

Transformers and TRL find the assistant's tokens by `{% generation %}` marks, but most chat templates have no marks.
Here a conversation is rendered without and with each assistant turn, and the text that the turn adds is the
assistant's. The package `datasets` belongs to the extra `train`, so it is imported only inside functions.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .conversations import Conversation, as_messages, images_in, text_of, with_images
from .image_texts import Pictures, images_of


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(f"transformers.{__name__}")

Row = dict[str, Any]

PREPARED = ("input_ids", "loss_mask", "length", "question", "is_shortened")  # columns that `prepare_dataset` writes
_COLUMNS = ("input_ids", "messages", "prompt", "text")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized text to train on."""

    input_ids: Tensor  # [t]
    loss_mask: Tensor  # [t] bool: tokens that the assistant wrote, including end-of-turn tokens
    pictures: Pictures | None = None

    @classmethod
    def of_row(cls, row: Row) -> "Example":
        """Make an example from a row that `prepare_dataset` made."""
        mask = torch.tensor(row["loss_mask"], dtype=torch.bool)
        return cls(torch.tensor(row["input_ids"]), mask, Pictures.of_row(row))

    @property
    def predicted(self) -> Tensor:
        """`loss_mask`, but false at the first two tokens of the text, which a head cannot predict; `[t]` bool."""
        mask = self.loss_mask.clone()
        mask[:2] = False
        return mask

    @property
    def tensors(self) -> dict[str, Any]:
        """The example as a row for `collate`: `input_ids`, `loss_mask` (from `predicted`), and `pictures` if any."""
        shown = {} if self.pictures is None else {"pictures": self.pictures}
        return {"input_ids": self.input_ids, "loss_mask": self.predicted, **shown}

    def check_ids(self, vocab_size: int, number: int) -> None:
        """Raise a `ValueError` about text `number` if it is empty or has an id outside the vocabulary."""
        if not len(self.input_ids):
            raise ValueError(f"Text {number} has no tokens. Leave out empty texts.")
        odd = self.input_ids[(self.input_ids < 0) | (self.input_ids >= vocab_size)]
        if len(odd):
            raise ValueError(
                f"Text {number} holds token id {int(odd[0])}, but the target's vocabulary has {vocab_size} tokens. "
                "It was made with another model's tokenizer, or holds labels: tokenize it with the target's own."
            )


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a text that is tokenized separately: an answer, or the text between two answers."""

    text: str
    is_learned: bool  # whether the head learns to predict these tokens
    images: int = 0  # number of images in the part
    is_raw: bool = False  # whether the tokenizer must add special tokens, because no chat template was used


def make_example(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """Tokenize a conversation and mark its answers; raise `ValueError` if the chat template rewrites earlier turns."""
    return _joined(_pieces(conversation, tokenizer, 0, {}), tokenizer, max_length)


def _pieces(conversation: list[Any], renderer: Any, learn_from: int, template: Row) -> list[_Piece]:
    """Render a conversation with `renderer`, a tokenizer or processor, and split the text into questions and answers.
    Messages before index `learn_from` count as questions. `template` has further arguments for the chat template.
    """
    pieces: list[_Piece] = []
    render = partial(renderer.apply_chat_template, tokenize=False, **template)
    text, read = "", 0
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or index < learn_from:
            continue
        asked: str = render(conversation[:index], add_generation_prompt=True)
        answered: str = render(conversation[: index + 1], add_generation_prompt=False)
        if not asked.startswith(text) or not answered.startswith(asked):
            raise ValueError(
                f"The chat template does not render conversations turn by turn: turn {index + 1} changes the text "
                "before it. Pass a tokenizer with a template that only appends."
            )
        end = len(answered.rstrip("\n"))  # templates write a line break after the end-of-turn token
        shown = sum(map(images_in, conversation[read:index]))
        pieces += [_Piece(asked[len(text) :], False, shown), _Piece(answered[len(asked) : end], True)]
        text, read = answered[:end], index
    return pieces


def _joined(
    pieces: Iterable[_Piece], tokenizer: Any, max_length: int, images: list[Any] | None = None, processor: Any = None
) -> Example:
    """Tokenize and join pieces, up to `max_length` tokens; stop before a piece with images that is too long."""
    ids: list[int] = []
    mask: list[bool] = []
    pictures = Pictures(images or [])
    for piece in pieces:
        if piece.images and images is not None:
            tokens = pictures.add(processor, piece.text, piece.images, len(ids), max_length - len(ids))
        else:
            tokens = tokenizer(piece.text, add_special_tokens=piece.is_raw)["input_ids"]
        if tokens is None:
            break
        ids += tokens
        mask += [piece.is_learned] * len(tokens)
        if len(ids) >= max_length:
            break
    shown = pictures if pictures.texts else None
    return Example(torch.tensor(ids[:max_length]), torch.tensor(mask[:max_length]), shown)


def prepare_dataset(
    dataset: "Dataset | IterableDataset",
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    vocab_size: int,
    num_proc: int | None = None,
    processor: ProcessorMixin | None = None,
) -> Any:
    """Tokenize a dataset, and drop rows without a token to learn from.

    The first column among `input_ids`, `messages`, `prompt` and `text` is used. Messages, also in `prompt` and
    `completion`, are rendered by the chat template, strings are not. The head learns from assistant turns, from the
    completion, or from all of `text`. Images come from a column `images` or `image`, and need a `processor`. Texts
    above `max_length` tokens are cut, but never within an image. Error messages call the dataset `name`.

    Returns a dataset of the same class with `input_ids`, `loss_mask`, `length` in tokens, `question` (the first user
    turn), `is_shortened` (only the first answer is used, because the chat template rewrites earlier turns) and, for a
    dataset with images, `images`, and `pictures`: the parts of the text that contain images, and where they begin (see
    `Pictures.parts`). A dataset that already has the columns in `PREPARED` is returned unchanged. An iterable dataset
    is prepared while it is read. Raises a `ValueError` if the dataset is empty, has other columns or content, has ids
    outside the vocabulary, or has nothing to learn from.
    """
    import datasets

    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` is empty. Pass a split that has rows, or another dataset.")
    if set(PREPARED) <= set(first):
        return dataset
    column = _read_column(first, name)
    has_images = shows_images(dataset)
    if has_images:
        _check_images(column, name, processor)
    if column != "input_ids" and tokenizer is None:
        raise ValueError(
            f"`{name}` has the column `{column}`, but there is no tokenizer for it where the target came from. Pass "
            "the target's as `processing_class`."
        )
    if has_images and "images" not in first:
        dataset = dataset.rename_column("image", "images")
    reader = _Reader(column, tokenizer, processor, max_length)
    how = {"name": name, "reader": reader, "vocab_size": vocab_size}
    options: Any = {"with_indices": True, "fn_kwargs": how}
    options["remove_columns"] = [column for column in first if column not in ("image", "images")]
    options["features"] = _features(dataset, has_images=has_images)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(_prepared_row, **options).filter(bool, input_columns="length")
    prepared = dataset.map(_prepared_row, num_proc=num_proc, desc=f"Tokenizing {name}", **options)
    if not all(prepared["length"]):
        prepared = prepared.filter(bool, input_columns="length")
    _check_prepared(prepared, len(dataset), name, max_length)
    return prepared


def shows_images(dataset: Any) -> bool:
    """Return whether a dataset has one of TRL's columns for images, `image` or `images`."""
    return bool({"image", "images"} & set(dataset.column_names or next(iter(dataset), ())))


def _check_images(column: str, name: str, processor: ProcessorMixin | None) -> None:
    if processor is None:
        raise ValueError(
            f"`{name}` has images, but the target reads none, or there is no processor for them. Pass the target's, "
            "as `AutoProcessor.from_pretrained` returns it, as `processing_class`."
        )
    if column not in ("messages", "prompt"):
        raise ValueError(
            f"`{name}` has images and the column `{column}`, but images are shown by `messages`, or by `prompt` and "
            "`completion`. Write it in one of these forms."
        )


def _features(dataset: Any, *, has_images: bool) -> Any:
    from datasets import Features, Image, List, Value

    kinds = (List(Value("int32")), List(Value("bool")), Value("int64"), Value("string"), Value("bool"))
    features = dict(zip(PREPARED, kinds, strict=True))
    if has_images:
        features["images"] = (dataset.features or {}).get("images", List(Image()))
        parts = {"texts": List(Value("string")), "counts": List(Value("int32")), "starts": List(Value("int32"))}
        features["pictures"] = parts | {"key": Value("string")}
    return Features(features)


def _prepared_row(row: Row, number: int, name: str, reader: "_Reader", vocab_size: int) -> Row:
    """Make the columns in `PREPARED` from a row. A row without a token to learn from gets length 0, to be dropped."""
    try:
        example, is_shortened = reader.example_of(row)
        question = reader.question_of(row)
    except ValueError as error:
        raise ValueError(f"Row {number} of `{name}`: {error}") from None
    if example.predicted.any():
        example.check_ids(vocab_size, number)
    else:
        example = Example(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool))
    values = (example.input_ids.tolist(), example.loss_mask.tolist(), len(example.input_ids), question, is_shortened)
    pictures = {"pictures": None if example.pictures is None else example.pictures.parts} if "images" in row else {}
    return dict(zip(PREPARED, values, strict=True)) | pictures


def _check_prepared(prepared: "Dataset", rows: int, name: str, max_length: int) -> None:
    if not len(prepared):
        raise ValueError(
            f"None of the {rows} rows of `{name}` has an assistant turn, or a completion, that begins within "
            f"`max_length={max_length}` tokens. Pass texts with answers, or raise `max_length`."
        )
    if dropped := rows - len(prepared):
        logger.warning(
            f"{dropped} of {rows} rows of `{name}` have no assistant turn, or completion, that begins within "
            f"{max_length} tokens: they are left out."
        )
    if shortened := sum(prepared["is_shortened"]):
        logger.warning(
            f"The chat template rewrites earlier turns in {shortened} of {rows} conversations of `{name}`: only their "
            "first answers are used."
        )


def _read_column(columns: Iterable[str], name: str) -> str:
    names = set(columns)
    if "prompt" in names and "completion" not in names and not names & {"input_ids", "messages"}:
        raise ValueError(
            f"`{name}` has the column `prompt` without `completion`, but a head learns from answers. Let the target "
            "write them with `generate`."
        )
    for column in _COLUMNS:
        if column in names:
            return column
    raise ValueError(
        f"`{name}` has the columns {sorted(names)}, but needs `messages`, `prompt` and `completion`, `text`, or "
        "`input_ids` with `assistant_masks` or `completion_mask`. Rename its columns."
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes a training `Example` from a row's value in `column`, with the target's tokenizer or processor."""

    column: str
    tokenizer: PreTrainedTokenizerBase | None
    processor: ProcessorMixin | None
    max_length: int

    def example_of(self, row: Row) -> tuple[Example, bool]:
        """Return the example made from a row, and whether it is cut after the first answer."""
        if self.column == "input_ids":
            return _tokenized(row, self.max_length), False
        images = images_of(row) if "images" in row else None
        pieces, is_shortened = self._pieces(row, images)
        return _joined(pieces, self.tokenizer, self.max_length, images, self.processor), is_shortened

    def _pieces(self, row: Row, images: list[Any] | None) -> tuple[list[_Piece], bool]:
        if self.column == "text":
            return [_Piece(_string(row, "text"), True, is_raw=True)], False
        if self.column == "prompt" and isinstance(row["prompt"], str):
            prompt = _Piece(row["prompt"], False, len(images or ()), is_raw=images is None)
            return [prompt, _Piece(_string(row, "completion"), True)], False
        columns = ("prompt", "completion") if self.column == "prompt" else ("messages",)
        if images is None:
            parts: list[list[Any]] = [as_messages(row[column], None) for column in columns]
        else:
            parts = [with_images(row[column], len(images) * (column != "completion")) for column in columns]
            shown = sum(map(images_in, parts[0]))
            if shown != len(images):
                raise ValueError(
                    f"has {len(images)} images, but its messages have places for {shown}. Write one part "
                    "`{'type': 'image'}` for each image, or none: then all stand before the first question."
                )
        renderer, template = self.tokenizer if images is None else self.processor, _template(row)
        if self.column == "messages":
            return _of_messages(parts[0], renderer, template)
        return _pieces(parts[0] + parts[1], renderer, len(parts[0]), template), False

    def question_of(self, row: Row) -> str | None:
        asked = row.get(self.column)
        if self.column == "prompt" and isinstance(asked, str):
            return asked
        if self.column not in ("messages", "prompt"):
            return None
        messages = with_images(asked, 0) if "images" in row else as_messages(asked, None)
        return next((text_of(turn["content"]) for turn in messages if turn["role"] == "user"), None)


def _template(row: Row) -> Row:
    """Collect the chat template's arguments from TRL's columns `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**({"tools": tools} if tools else {}), **(row.get("chat_template_kwargs") or {})}


def _of_messages(conversation: list[Any], renderer: Any, template: Row) -> tuple[list[_Piece], bool]:
    """Drop assistant turns before the first question, and split the rest into questions and answers. If the template
    rewrites earlier turns, keep only the turns up to the first answer; the second result is then true.
    """
    roles = [message["role"] for message in conversation]
    first = roles.index("user") if "user" in roles else len(roles)
    asked = [turn for turn in conversation[:first] if turn["role"] != "assistant"] + conversation[first:]
    try:
        return _pieces(asked, renderer, 0, template), False
    except ValueError:
        answer = next(i for i, turn in enumerate(asked) if turn["role"] == "assistant")
        if answer + 1 == len(asked):
            raise
        return _pieces(asked[: answer + 1], renderer, 0, template), True


def _tokenized(row: Row, max_length: int) -> Example:
    ids = _integers(row["input_ids"], "input_ids")
    mask = torch.ones(len(ids), dtype=torch.bool)
    for column in ("assistant_masks", "completion_mask", "labels"):
        if row.get(column) is not None:
            values = _integers(row[column], column)
            if len(values) != len(ids):
                raise ValueError(f"has {len(ids)} `input_ids`, but {len(values)} `{column}`.")
            mask &= values >= 0 if column == "labels" else values != 0
    return Example(ids[:max_length], mask[:max_length])


def _integers(values: Any, column: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.zeros(1, 1)
    if tensor.ndim != 1 or (tensor.is_floating_point() and len(tensor)):
        raise ValueError(f"has `{column}` that are {str(values)[:60]}, but they must be a list of integers.")
    return tensor.long()


def _string(row: Row, column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"has the {column} {str(text)[:60]}, but it must be a string, or both lists of messages.")
    return text
