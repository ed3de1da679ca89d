"""Batch prepared datasets for PyTorch: texts of similar length, right-padded, within a budget of tokens."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import ProcessorMixin

from .image_texts import IMAGE_COLUMNS, image_inputs
from .preparation import Example


IGNORED = -100  # Label of tokens that the loss ignores.


def collate(rows: Sequence[dict[str, Any]], processor: ProcessorMixin | None = None) -> dict[str, Any]:
    """Join `rows` (dicts like `Example.tensors`) to a batch: right-pad tensors `[t, ...]` with zeros to `[b, t, ...]`.
    `labels` replace `loss_mask`: the token ids where the mask is true, elsewhere `IGNORED`. If any row has `pictures`,
    the batch has `image_inputs`, the image arguments of the target's forward, which `processor` computes.
    """
    names = [name for name in rows[0] if name != "pictures"]
    batch: dict[str, Any] = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in names}
    batch["labels"] = batch["input_ids"].masked_fill(~batch.pop("loss_mask"), IGNORED)
    shown = [row.get("pictures") for row in rows]
    if any(shown):
        assert processor is not None
        batch["image_inputs"] = image_inputs(shown, processor, batch["input_ids"].shape[1])
    return batch


class TokenBudgetBatches(Sampler[list[int]]):
    """Groups texts of the given `lengths` (in tokens) by similar length; yields each batch as a list of text indices.

    A batch has at most `budget` tokens, padding included, or is one longer text. Batches are made once; each epoch
    yields them in another order if `shuffle` is true.
    """

    batch_size = None  # Accelerate reads this attribute; batches differ in size

    def __init__(self, lengths: Sequence[int], budget: int, *, seed: int = 0, shuffle: bool = True) -> None:
        self._seed, self._shuffle, self._epoch = seed, shuffle, 0
        order = torch.arange(len(lengths))
        if shuffle:
            order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        by_length = sorted(order.tolist(), key=lambda index: -(lengths[index] // 16))
        self._batches: list[list[int]] = []
        longest = 0
        for index in by_length:
            longest = max(longest, lengths[index])
            if not self._batches or (len(self._batches[-1]) + 1) * longest > budget:
                self._batches.append([])
                longest = lengths[index]
            self._batches[-1].append(index)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self._batches)))
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        for index in order:
            yield self._batches[index]


_TEXT_COLUMNS = ("input_ids", "loss_mask")


class PreparedTexts(Dataset[dict[str, Any]]):
    """PyTorch dataset of `rows`, a `datasets.Dataset` from `prepare_dataset`; item i is row i's `Example.tensors`."""

    def __init__(self, rows: Any) -> None:
        read = {*_TEXT_COLUMNS, *IMAGE_COLUMNS}
        self._rows = rows.select_columns([name for name in rows.column_names if name in read])
        self.lengths: list[int] = list(rows["length"])  # tokens of each row

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(index).tensors

    def example(self, index: int) -> Example:
        """Return row `index` as an `Example`; unlike in `self[index]`, its mask may include the first two tokens."""
        return Example.of_row(self._rows[index])

    def examples(self) -> Iterator[Example]:
        """Yield an `Example`, without its images, for each row in order."""
        return map(Example.of_row, self._rows.select_columns(list(_TEXT_COLUMNS)))

    def some(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield `count` rows (all, if there are fewer) at even distances in a list sorted by length."""
        by_length = sorted(range(len(self)), key=lambda index: self.lengths[index])
        count = min(count, len(self))
        return (self[by_length[index * len(self) // count]] for index in range(count))


_STREAM_BUFFER = 1024  # Number of rows that are read at once and grouped by length.


class StreamedBatches(IterableDataset[list[dict[str, Any]]]):
    """Yields batches (lists of `Example.tensors`) of at most `budget` tokens from `rows`, a `datasets.IterableDataset`
    that `prepare_dataset` made. It reads 1024 rows at a time, in order, and batches rows of similar length.
    """

    def __init__(self, rows: Any, budget: int, *, seed: int = 0) -> None:
        self._rows, self._budget, self._seed = rows, budget, seed
        self.questions: set[str] = set()  # first user turns of the rows read so far

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        rows = iter(self._rows)
        while buffer := list(islice(rows, _STREAM_BUFFER)):
            self.questions.update(row["question"] for row in buffer if row["question"] is not None)
            for group in TokenBudgetBatches([row["length"] for row in buffer], self._budget, seed=self._seed):
                yield [Example.of_row(buffer[index]).tensors for index in group]

    def set_epoch(self, epoch: int) -> None:
        self._rows.set_epoch(epoch)

    def examples(self, count: int) -> Iterator[Example]:
        return map(Example.of_row, islice(self._rows, count))

    def some(self, count: int) -> Iterator[dict[str, Any]]:
        return (example.tensors for example in self.examples(count))
