"""Turn a dataset in TRL's columns into token ids, with `datasets`' own caching and progress bars."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from .examples import check_token_ids
from .rows import column_kind, example_of, question_of


if TYPE_CHECKING:  # of the extra `train`; a head can be checked and served without it
    from datasets import Dataset, Features, IterableDataset

logger = logging.getLogger(f"transformers.{__name__}")

PREPARED = ("input_ids", "loss_mask", "length", "question", "is_shortened")


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

    Args:
        dataset: with columns as `column_kind` knows them. One that was prepared is returned as it is.
        name: of the dataset, for errors and the progress bar.
        tokenizer: the target's; not needed for `input_ids`.
        max_length: in tokens; longer texts are cut.
        vocab_size: the target's vocabulary size.
        num_proc: processes that tokenize.

    Returns:
        A dataset of the same class: `input_ids`, `loss_mask` (what to learn from), `length` in tokens, `question` (the
        first user turn) and `is_shortened` (only the first answer is used). Iterable ones are prepared as they are
        read.

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
    kind = column_kind(first, name)
    if kind != "input_ids" and tokenizer is None:
        raise ValueError(
            f"`{name}` has the column `{kind}`, but there is no tokenizer for it where the target came from. Pass the "
            "target's as `processing_class`."
        )
    how = {"kind": kind, "name": name, "tokenizer": tokenizer, "max_length": max_length, "vocab_size": vocab_size}
    given: Any = {"batched": True, "with_indices": True, "remove_columns": list(first), "fn_kwargs": how}
    given["features"] = _prepared_features()
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(_tokenized, **given)
    prepared = dataset.map(_tokenized, num_proc=num_proc, desc=f"Tokenizing {name}", **given)
    _check_prepared(prepared, len(dataset), name, max_length)
    return prepared


def _prepared_features() -> "Features":
    """The columns of a prepared dataset."""
    import datasets

    return datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "loss_mask": datasets.List(datasets.Value("bool")),
            "length": datasets.Value("int64"),
            "question": datasets.Value("string"),
            "is_shortened": datasets.Value("bool"),
        }
    )


def _check_prepared(prepared: "Dataset", rows: int, name: str, max_length: int) -> None:
    if not len(prepared):
        raise ValueError(
            f"None of the {rows} rows of `{name}` has an assistant turn, or a completion, that begins within "
            f"`max_length={max_length}` tokens. Pass texts with answers (training/generate_dataset.py makes them), or "
            "raise `max_length`."
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


def _tokenized(
    batch: dict[str, list[Any]],
    numbers: Iterable[int],
    kind: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    vocab_size: int,
) -> dict[str, list[Any]]:
    """A batch of rows, prepared."""
    made: dict[str, list[Any]] = {column: [] for column in PREPARED}
    for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
        row = dict(zip(batch, values, strict=True))
        try:
            example, is_shortened = example_of(row, kind, tokenizer, max_length)
            question = question_of(row, kind)
        except ValueError as error:
            raise ValueError(f"Row {number} of `{name}`: {error}") from None
        if not example.predicted.any():
            continue
        check_token_ids([example], vocab_size, first_number=number)
        found = (example.input_ids.tolist(), example.loss_mask.tolist(), len(example.input_ids))
        for column, value in zip(PREPARED, (*found, question, is_shortened), strict=True):
            made[column].append(value)
    return made
