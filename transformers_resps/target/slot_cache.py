"""Buffers of slots: keys and values whose place says nothing about their position in the text.

A tree's nodes are written to free slots. Accepted ones stay where they are, and the slots of the others are free
again, so that nothing moves and nothing is forgotten. The mask tells which slots a node sees.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..compilation.kept_tensors import is_of_this_mode
from .tree_cache import replace_entries


class SlotLayer(CacheLayerMixin):
    """One layer's buffers during one forward.

    Args:
        keys: `[slots, b, kv heads, hd]`; a window of the buffers.
        values: like `keys`; `hd` may differ.
        written: `[b, n]` the slots that the forward writes.
    """

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, written: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers = keys, values
        rows = torch.arange(written.shape[0], device=written.device)[:, None]
        self._places = written, rows.expand_as(written)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[b, kv heads, n, hd]` entries; returns all slots, `[b, kv heads, slots, hd]`."""
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.index_put_(self._places, states.transpose(1, 2))
        keys, values = (buffer.permute(1, 2, 0, 3) for buffer in self._buffers)
        return keys, values

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The buffers are there."""

    def get_seq_length(self) -> int:
        """Zero: positions are passed to the forward, and so is the mask."""
        return 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """The slots, from 0 on."""
        return self._buffers[0].shape[0], 0

    def get_max_length(self) -> int:
        """The slots."""
        return self._buffers[0].shape[0]

    get_max_cache_shape = get_max_length


class SlotBuffers:
    """The buffers of all layers of a target, as large as any text needed so far; kept from call to call.

    Windows of them are kept: compiled code meets the same tensors again.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []  # keys and values of the first layer, of the second, and so on
        self._windows: dict[int, list[Tensor]] = {}

    @property
    def size(self) -> int:
        """Slots."""
        return self._parts[0].shape[0] if self._parts else 0

    def fill(self, layers: list[Any], length: int, rows: int, size: int) -> None:
        """Take over the entries of filled dynamic layers, each at the slot of its place in the text.

        Args:
            layers: with entries `[b, kv heads, s, hd]`; a sliding one has the last ones of the text only.
            length: of the text.
            rows: of the buffers, at least b; copies of the batch's last row fill those that are too many.
            size: slots that are needed.
        """
        parts = [part for layer in layers for part in (layer.keys, layer.values)]
        kinds = [(rows, part.shape[1], part.shape[3], part.dtype, part.device) for part in parts]
        known = [(*part.shape[1:], part.dtype, part.device) for part in self._parts]
        if self.size < size or known != kinds or not is_of_this_mode(self._parts[0]):
            self._own([part.new_zeros(size, rows, part.shape[1], part.shape[3]) for part in parts])
        for buffer, part in zip(self._parts, parts, strict=True):
            entries = part.permute(2, 0, 1, 3)
            place = buffer[length - len(entries) : length]
            place[:, : entries.shape[1]] = entries
            place[:, entries.shape[1] :] = entries[:, -1:]

    def grow(self, size: int) -> None:
        """Move to buffers of `size` slots."""
        grown = [part.new_zeros(size, *part.shape[1:]) for part in self._parts]
        for buffer, part in zip(grown, self._parts, strict=True):
            buffer[: len(part)] = part
        self._own(grown)

    def keep_rows(self, rows: list[int]) -> None:
        """Forget all rows but these; as many rows as there are stay where they are."""
        order, kept = torch.tensor(rows), list[Tensor]()
        for part in self._parts:
            order = order.to(part.device)  # once, unless layers lie on several devices
            kept.append(part.index_select(1, order))
        if kept and kept[0].shape == self._parts[0].shape:
            for part, chosen in zip(self._parts, kept, strict=True):
                part.copy_(chosen)
        else:
            self._own(kept)

    def window(self, size: int) -> list[Tensor]:
        """The first `size` slots: keys and values `[slots, b, kv heads, hd]` of the first layer, the second, ..."""
        if size not in self._windows:
            self._windows[size] = [_front(part, size) for part in self._parts]
        return self._windows[size]

    def entries(self, slots: list[list[int]]) -> list[Tensor]:
        """`[b, kv heads, s, hd]` of each row's `slots`, in their order; keys and values of each layer in turn."""
        places = torch.tensor(slots, device=self._parts[0].device)
        order = torch.arange(len(slots), device=places.device)[:, None]
        return [part[places, order].transpose(1, 2) for part in self._parts]

    def _own(self, parts: list[Tensor]) -> None:
        self._parts, self._windows = parts, {}


def _front(part: Tensor, size: int) -> Tensor:
    """The first `size` slots of a contiguous buffer; where code is compiled, as a tensor that is no view."""
    if part.device.type != "cpu":
        return part[:size]
    storage, shape = part.untyped_storage(), (size, *part.shape[1:])
    return part.new_empty(0).set_(storage, 0, shape, part.stride())  # type: ignore[call-overload, no-any-return]


def filled_layers(cache: Cache) -> list[Any]:
    """The layers that hold entries; one that shares another's keys has none."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if getattr(layer, "keys", None) is not None]


def give_back(parts: list[Tensor], cache: Cache, length: int) -> None:
    """Let the dynamic layers of a cache hold entries `[b, kv heads, s, hd]` of `length` positions; keys and values in
    turn.
    """
    for layer, keys, values in zip(filled_layers(cache), parts[::2], parts[1::2], strict=True):
        kept = min(length, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else length
        replace_entries(layer, [part[:, :, length - kept :].contiguous() for part in (keys, values)], length)
