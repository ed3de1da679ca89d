"""Texts of similar length in batches of a token budget, right-padded."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler


IGNORED = -100  # label of a token that has no loss


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Right-pad every field of `rows` with zeros; `labels` holds the predicted tokens and is `IGNORED` elsewhere.

    Args:
        rows: each has `input_ids` and `loss_mask` `[t]`, and optionally fields `[t, ...]` of the target.

    Returns:
        The fields as `[b, t, ...]`, with `labels` in place of `loss_mask`.
    """
    length = max(len(row["input_ids"]) for row in rows)
    batch = {name: torch.stack([_padded(row[name], length) for row in rows]) for name in rows[0]}
    batch["labels"] = batch["input_ids"].masked_fill(~batch.pop("loss_mask"), IGNORED)
    return batch


def _padded(tensor: Tensor, length: int) -> Tensor:
    missing = length - len(tensor)
    return F.pad(tensor, (0,) * (2 * (tensor.ndim - 1)) + (0, missing)) if missing else tensor


class TokenBudgetBatches(Sampler[list[int]]):
    """Batches of at most `budget` tokens, padding included: the same batches in every epoch, in a new order.

    Args:
        lengths: tokens of each text.
        budget: tokens of a batch; a longer text is a batch of its own.
        seed: seed of the grouping and of the order.
        shuffle: texts of nearly the same length in random groups, groups in random order; otherwise as given.
    """

    batch_size = None  # read by Accelerate: batches differ in size

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
        """Choose the order of `epoch`."""
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
