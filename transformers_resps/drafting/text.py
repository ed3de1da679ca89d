"""Keeps the texts of one call for a draft model, and assigns cache slots and positions to their tokens.

A slot is an index in the cache's buffers. Places are tensors that a model computes from positions, such as angles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..verifying.rows import SlotMap
from .cache import DraftCache
from .drafter import Committed
from .step_model import Places, StepModel


_POSITIONS = 256  # Minimum number of consecutive positions for which `StepModel.places` is computed at once.


class PlaceWindow:
    """Computes `StepModel.places` (such as RoPE angles) of many positions at once, and keeps them for later passes."""

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self._known, self._numbers = range(0), torch.empty(0)
        self._newest: range | Tensor = range(0)  # The positions whose places are stored in `_places`.
        self._places: Places = ()

    def places(self, every: range | Tensor, wanted: slice) -> Places:
        """Return the tensors `[b or 1, t, any]` that `StepModel.places` computes for the positions `every[wanted]`."""
        if not isinstance(every, Tensor) and self._model.has_fixed_places:
            wanted, every = self._within(every, wanted), self._known
        if every is not self._newest:  # all at once, since the last position may affect the places of all others
            positions = every if isinstance(every, Tensor) else self._count(every)
            self._newest, self._places = every, self._model.places(positions)
        return tuple(part[:, wanted] for part in self._places)

    def numbers(self, every: range | Tensor, wanted: slice) -> Tensor:
        """Return the positions `every[wanted]` as a tensor `[b or 1, t]`."""
        if isinstance(every, Tensor):
            return every[:, wanted]
        wanted = self._within(every, wanted)
        return self._numbers[:, wanted]

    def _within(self, every: range, wanted: slice) -> slice:
        """Return the slice of `_known` that holds the positions `every[wanted]`; extend `_known` if needed."""
        if not self._known or every.start < self._known.start or every.stop > self._known.stop:
            self._known = range(every.start, max(every.stop, every.start + _POSITIONS))
            self._numbers = self._count(self._known)
        part = every[wanted]
        return slice(part.start - self._known.start, part.stop - self._known.start)

    def _count(self, every: range) -> Tensor:
        return torch.arange(every.start, every.stop, device=self._model.device)[None]


class Positions(NamedTuple):
    """Positions of some tokens: `every[wanted]`, where `every` is a range or a tensor `[b or 1, t]`."""

    window: PlaceWindow  # computes their places
    every: range | Tensor
    wanted: slice

    @property
    def places(self) -> Places:
        """The tensors, such as RoPE angles, that `StepModel.places` computes from these positions."""
        return self.window.places(self.every, self.wanted)

    @property
    def numbers(self) -> Tensor:
        """The positions as a tensor `[b or 1, t]`."""
        return self.window.numbers(self.every, self.wanted)

    def part(self, start: int, stop: int) -> "Positions":
        """Return the positions at the indices from `start` to before `stop`."""
        return self._replace(wanted=slice(self.wanted.start + start, self.wanted.start + stop))


class Prefix:
    """A text in a cache that has room for a tree, and `ahead`, the positions that follow the text.

    The text may use `length` cache slots from 0 on. `rows` tracks which of these each row has filled; it is `None` if
    `seen` and `ends` are passed.
    """

    def __init__(
        self,
        cache: DraftCache,
        length: int,
        ahead: Positions,
        rows: SlotMap | None = None,
        seen: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> None:
        self.cache, self.length, self.ahead, self._rows = cache, length, ahead, rows
        self._seen, self._ends = seen, ends

    @property
    def seen(self) -> Tensor | None:
        """Bool mask `[b or 1, length]`, true for slots that tokens may attend to; `None` if they may attend to all."""
        if self._seen is None and self._rows is not None:
            self._seen = self._rows.visible(self.length, self.cache.device)
        return self._seen

    @property
    def ends(self) -> Tensor | None:
        """The slot after each row's text, `[b or 1, 1]`; `None` if this is `length` for all rows."""
        if self._rows is None or self.seen is None:
            return self._ends
        return self._rows.ends(self.cache.device)

    def seen_at(self, depth: int) -> Tensor | None:
        """Return `seen` for the layer of one MTP depth: at depth k, the first k tokens of a text have no keys."""
        if depth == 0:
            return self.seen
        seen = self.cache.all_seen(self.length) if self.seen is None else self.seen
        return seen & (seen.cumsum(-1) > depth)

    def shown(self, length: int) -> Tensor:
        """Return `seen` for `length` slots, or `[1, 1]` if all are true; values after a row's text are arbitrary."""
        seen = None if self._rows is None else self._rows.visible(length, self.cache.device)
        return self.cache.all_seen(1) if seen is None else seen


class Pairs(NamedTuple):
    """The newest tokens of a text, which a model processes next, and the features that they are paired with."""

    tokens: Tensor  # [b, t]; a row with fewer than t tokens repeats some of them
    features: Tensor | None  # [b, t, F]; `None` if the model reads none
    where: int | Tensor  # the slot of the first token in all rows, or the slots of each row, [b or 1, t]
    positions: Positions  # positions of the tokens

    @property
    def slots(self) -> Tensor:
        """The slots of the tokens, `[b or 1, t]`."""
        if isinstance(self.where, Tensor):
            return self.where
        stop = self.where + self.tokens.shape[1]
        return torch.arange(self.where, stop, device=self.tokens.device)[None]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Committed tokens `[b, t]` that the model has not processed, and the features `[b, t, F]` paired with them."""

    tokens: Tensor
    features: Tensor | None
    counts: list[int]  # number of tokens of each row

    def of_rows(self, rows: list[int], order: Tensor) -> "_Waiting":
        counts = [self.counts[row] for row in rows]
        most = max(counts)
        features = None if self.features is None else self.features[:, :most]
        features = None if features is None else features.index_select(0, order.to(features.device))
        return _Waiting(self.tokens[:, :most].index_select(0, order.to(self.tokens.device)), features, counts)

    def without_first(self, count: int) -> "_Waiting":
        """Drop the first `count` tokens. All rows must have the same number of tokens."""
        features = None if self.features is None else self.features[:, count:]
        return _Waiting(self.tokens[:, count:], features, [own - count for own in self.counts])


class DraftText:
    """Holds the `rows` texts of a call for one model: a cache of processed tokens, and a queue of unprocessed ones.

    `prompt_mask` `[b, s]` is 0 for padding, `None` without any. It covers the s prompt positions that the model
    processes: all, or those with features if the model needs features.
    """

    def __init__(self, model: StepModel, cache: DraftCache, rows: int, prompt_mask: Tensor | None) -> None:
        self._model, self._cache, self._rows = model, cache, rows
        self._slots = SlotMap(None if prompt_mask is None else prompt_mask.to(model.device))
        self._window = PlaceWindow(model)
        self._waiting: list[_Waiting] = []
        self._forgotten = 0  # number of dropped positions before slot 0

    @property
    def waiting(self) -> int:
        """Number of queued tokens per row, padding included."""
        return sum(part.tokens.shape[1] for part in self._waiting)

    def add(self, committed: Committed) -> None:
        """Queue committed tokens until the model processes them."""
        tokens, features, rows, *_ = committed
        if not self._model.reads_features:
            features = None
        elif features is not None:
            tokens = tokens[:, -features.shape[1] :]  # the first token of a text has no features before it
        counts = [tokens.shape[1]] * len(tokens) if rows is None else list(map(len, rows))
        self._waiting.append(_Waiting(tokens, features, counts))

    def keep_rows(self, rows: list[int], order: Tensor) -> None:
        """Drop all rows except `rows`; `order` holds the same indices on the model's device."""
        self._rows = len(rows)
        self._waiting = [part.of_rows(rows, order) for part in self._waiting]
        self._slots.keep_rows(rows)
        self._cache.keep_rows(order)

    def take(self, ahead: int = 0, tree: int = 0) -> tuple[Pairs | None, Prefix]:
        """Assign cache slots to all queued tokens; return these as pairs (`None` if none is queued), and the text.

        Also reserve what the next draft needs: `ahead` positions after the text, and `tree` cache slots.
        """
        self._forget()
        model, device = self._model, self._model.device
        counts, width = [part.counts for part in self._waiting], self.waiting
        start, is_even = self._slots.length, self._slots.stays_even(counts)
        # Rotary attention depends only on distances, so slots can serve as positions although slots count padding.
        pads = None if model.counts_padding else self._slots.pads
        where: int | Tensor = start
        every: range | Tensor
        if pads is None and is_even:
            for gained in counts:
                self._slots.extend(gained)
            every = range(self._forgotten + start, self._forgotten + self._slots.length + ahead)
        else:
            slots = self._slots.take(counts, device, ahead)
            every = slots + self._forgotten if self._forgotten else slots
            every = every if pads is None else slots - pads
            where = start if is_even else slots[:, :width]
        self._cache.reserve(self._slots.length, tree)
        here = Positions(self._window, every, slice(0, width))
        text = Prefix(self._cache, self._slots.length, here.part(width, width + ahead), self._slots)
        if not width:
            return None, text
        tokens = _joined([part.tokens.to(device) for part in self._waiting])
        features = [part.features.to(device, model.dtype) for part in self._waiting if part.features is not None]
        self._waiting.clear()
        return Pairs(tokens, _joined(features) if features else None, where, here), text

    def _forget(self) -> None:
        """Drop tokens outside the sliding window of every token after the queued ones."""
        if self._model.sliding_window is None:
            return
        ends, length = self._slots.row_ends(self._rows), self._slots.length
        waiting = [part.counts for part in self._waiting]
        shortest = min(sum(counts) for counts in zip(ends, *waiting, strict=True))
        unseen = self._model.oldest_seen(self._forgotten + shortest) - self._forgotten
        count = min(unseen, *ends)
        skipped = self._skip(unseen - count) if count == length else 0
        if count + skipped:
            self._cache.forget(count, length)
            self._slots.extend([skipped] * self._rows)
            self._slots.forget(count + skipped)
            self._forgotten += count + skipped

    def _skip(self, count: int) -> int:
        """Drop up to `count` first queued tokens, as long as all rows have equally many; return the number dropped."""
        left = count
        for at, part in enumerate(self._waiting):
            dropped = min(left, part.counts[0]) if min(part.counts) == max(part.counts) else 0
            self._waiting[at] = part.without_first(dropped)
            left -= dropped
            if dropped < part.counts[0]:
                break
        return count - left


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors `[b, t, ...]` along t; a single tensor is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
