"""The KV cache of a drafter: entries of the text, and before them those of the tree being drafted."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .step_model import Entries, StepModel


_GROWTH = 256  # positions added when the buffers are full
_TREE_ROOM = 128  # entries of a tree at first


class DraftCache:
    """Preallocated keys and values of every layer; the caller knows what each slot holds.

    The sequence has the slots 0, 1, ..., a tree negative ones, so that both lie side by side and trees stay in place
    while the sequence grows. The next tree overwrites the last (EAGLE's stable keys), so dropping one costs nothing.
    Buffers start as zeros: a masked slot may be read.

    Args:
        buffers: keys and values of each layer in turn, `[b, kv heads, tree_room + capacity, hd]`. A layer that has
            none gets them when it first writes.
        tree_room: how many of the slots, the first ones, are for a tree.
    """

    def __init__(self, buffers: Sequence[Tensor] = (), tree_room: int = _TREE_ROOM) -> None:
        pairs = zip(buffers[::2], buffers[1::2], strict=True)
        self._layers = dict(enumerate(pairs))
        self._tree_room = tree_room
        self._capacity = buffers[0].shape[2] - tree_room if buffers else _GROWTH

    @classmethod
    def empty(cls, model: StepModel, rows: int) -> "DraftCache":
        """For a model and so many rows; `reserve` makes it grow."""
        slots = _TREE_ROOM + _GROWTH
        shapes = [(rows, heads, slots, width) for heads, width in model.entry_widths for _ in range(2)]
        return cls([torch.zeros(shape, dtype=model.dtype, device=model.device) for shape in shapes])

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """As they were given, those of layers that have written since included."""
        return tuple(part for _, pair in sorted(self._layers.items()) for part in pair)

    @property
    def tree_room(self) -> int:
        """Slots for a tree."""
        return self._tree_room

    @property
    def capacity(self) -> int:
        """Slots for the sequence."""
        return self._capacity

    def reserve(self, length: int, tree: int = 0) -> None:
        """Make room for `length` positions of the sequence, which is kept, and `tree` nodes."""
        more = length - self._capacity + _GROWTH if length > self._capacity else 0
        ahead = max(tree - self._tree_room, 0)
        if more or ahead:
            self._layers = {
                layer: (F.pad(keys, (0, 0, ahead, more)), F.pad(values, (0, 0, ahead, more)))
                for layer, (keys, values) in self._layers.items()
            }
            self._capacity, self._tree_room = self._capacity + more, self._tree_room + ahead

    def forget(self, count: int, length: int) -> None:
        """Drop the first `count` positions of a sequence of `length`. The others move to its beginning."""
        room = self._tree_room
        for kept in self.buffers if count < length else ():
            kept[:, :, room : room + length - count] = kept[:, :, room + count : room + length].clone()

    def attend_from(
        self, start: int, mask: Tensor | None, *, end: int | None = None, is_causal: bool = False
    ) -> Entries:
        """Attention that writes its keys at the slots `[start, start + t)`.

        Args:
            start: where the new entries go; below 0 for a tree.
            mask: see `Entries`. The s slots are those from 0, or from `start` if that is lower, to `end`.
            end: slot after the last that is seen; `start + t` when `None`.
            is_causal: instead of a mask, for `start == 0`.

        Fewer queries than keys mean that only the newest position has a query.
        """
        return _EntriesFrom(self, start, end, mask, is_causal=is_causal)

    def attend_at(self, slots: Tensor, end: int, mask: Tensor, *, first: int = 0) -> Entries:
        """As `attend_from`, but keys are written at each row's own `slots` `[b, t]`, and the slots from `first` to
        before `end` are seen.
        """
        return _EntriesAt(self, slots, first, end, mask)

    def of_layer(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's buffers, which hold entries such as these: slot i is at `tree_room + i`."""
        if layer not in self._layers:
            slots = self._tree_room + self._capacity
            self._layers[layer] = tuple(  # type: ignore[assignment]  # of two
                part.new_zeros(*part.shape[:2], slots, part.shape[3]) for part in (keys, values)
            )
        return self._layers[layer]

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but these, `[r]` on the cache's device."""
        self._layers = {
            layer: (keys.index_select(0, rows), values.index_select(0, rows))
            for layer, (keys, values) in self._layers.items()
        }


class _EntriesFrom(Entries):
    """See `DraftCache.attend_from`."""

    def __init__(
        self, cache: DraftCache, start: int, end: int | None, mask: Tensor | None, *, is_causal: bool
    ) -> None:
        self._cache, self._start, self._end = cache, start, end
        self.mask, self.first_slot, self._is_causal = mask, min(start, 0), is_causal

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        room, stop = self._cache.tree_room, self._start + keys.shape[2]
        seen = slice(room + self.first_slot, room + (stop if self._end is None else self._end))
        found = []
        for kept, part in zip(self._cache.of_layer(layer_idx, keys, values), (keys, values), strict=True):
            kept[:, :, room + self._start : room + stop] = part
            found.append(kept[:, :, seen])
        return found[0], found[1]

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        newest_only = queries.shape[2] < keys.shape[2]  # the last query sees everything
        keys, values = self.update(keys, values, layer)
        if self._is_causal and not newest_only:
            grouped = keys.shape[1] != queries.shape[1]
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
        return self._attended(queries, keys, values)


class _EntriesAt(Entries):
    """See `DraftCache.attend_at`."""

    def __init__(self, cache: DraftCache, slots: Tensor, first: int, end: int, mask: Tensor) -> None:
        self._cache, self._slots, self.first_slot, self._end, self.mask = cache, slots, first, end, mask

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        room = self._cache.tree_room
        here, found = (room + self._slots)[:, None, :, None], []
        for kept, part in zip(self._cache.of_layer(layer_idx, keys, values), (keys, values), strict=True):
            kept.scatter_(2, here.expand_as(part), part)
            found.append(kept[:, :, room + self.first_slot : room + self._end])
        return found[0], found[1]
