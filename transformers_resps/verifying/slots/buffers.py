"""Static buffers of keys and values, kept from call to call: token i of a row's text has slot i.

A tree's nodes are written to the slots after the text; accepted nodes then move to the slots next to the text.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ...compat import cache_layers
from ...compilation.engine import is_of_this_mode
from ...compilation.pages import zeros
from ..cache import replace_entries


class SlotLayer(CacheLayerMixin):
    """A cache layer for one forward; its storage is the buffers of one model layer, `[b, kv heads, capacity, hd]`.

    The forward writes its keys and values to the slots `written` `[b, n]`, and attends over the first `size` slots.
    """

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, written: Tensor, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers, self._written, self._size = (keys, values), written, size
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values `[b, kv heads, n, hd]`; return all keys and values in the first `size` slots."""
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            self._write(buffer, states)
        keys, values = (buffer[:, :, : self._size] for buffer in self._buffers)
        return keys, values

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        if self._written.shape[0] == 1:
            buffer.index_copy_(2, self._written[0], states)
        else:
            buffer[row_index(self._written), :, self._written] = states.transpose(1, 2)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the buffers exist."""

    def get_seq_length(self) -> int:
        """Return 0, since the forward gets its positions and masks as arguments."""
        return 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._size, 0

    def get_max_length(self) -> int:
        return self._size

    get_max_cache_shape = get_max_length


def row_index(slots: Tensor) -> Tensor:
    """Return a tensor shaped like `slots` `[b, n]` that holds each entry's row index: all of row i is i."""
    return torch.arange(slots.shape[0], device=slots.device)[:, None].expand_as(slots)


class SlotBuffers:
    """Static buffers of keys and values, reused by later calls; a part is one layer's keys or one layer's values."""

    def __init__(self) -> None:
        self._stores: list[Tensor] = []  # `[parts, b, kv heads, slots, hd]`; a store holds all parts of equal sizes
        self._rooms: list[Tensor] = []  # views of the stores: keys and values of the first layer, the second, ...
        self._rows = 0  # number of rows in use, from the first on
        self._parts: dict[int | None, list[Tensor]] = {}
        self._unread: ref[Cache] | None = None

    def lend(self, cache: Cache) -> None:
        """Remember `cache`, which copies the buffers when first read, so as to fill it before they are overwritten."""
        self._unread = ref(cache)

    def _settle(self) -> None:
        cache, self._unread = None if self._unread is None else self._unread(), None
        if cache is not None:
            len(cache.layers)  # reading `layers` fills it

    @property
    def size(self) -> int:
        return self._rooms[0].shape[2] if self._rooms else 0

    def parts(self, row: int | None = None) -> list[Tensor]:
        """List each layer's keys, then its values, `[b, kv heads, slots, hd]`; if `row` is given, only of this row.

        Repeated calls return the same tensors.
        """
        if row not in self._parts:
            rows = slice(self._rows) if row is None else slice(row, row + 1)
            self._parts[row] = [_no_view(room[rows]) for room in self._rooms]
        return self._parts[row]

    def reserve(self, kinds: Sequence[Tensor], rows: int, size: int) -> None:
        """Make room for `rows` rows of `size` or more slots for parts like the tensors `kinds`; new buffers hold 0."""
        self._settle()
        shapes = [(part.shape[1], part.shape[3], part.dtype, part.device) for part in kinds]
        known = [(room.shape[1], room.shape[3], room.dtype, room.device) for room in self._rooms]
        is_large = self.size >= size and known == shapes and len(self._rooms[0]) >= rows
        if not is_large or not is_of_this_mode(self._rooms[0]):
            self._stores, free = [], {}
            for shape, count in Counter(shapes).items():
                heads, width, dtype, device = shape
                store = zeros(count, rows, heads, size, width, dtype=dtype, device=device)
                self._stores.append(store)
                free[shape] = iter(store)
            self._rooms = [next(free[shape]) for shape in shapes]
        self._use(rows)

    def fill(self, parts: Sequence[Tensor], length: int, orders: Sequence[Tensor]) -> None:
        """Copy keys and values of a dynamic cache with `length` positions to the first slots.

        `parts` are each layer's keys, then values, `[b, kv heads, s, hd]`; a sliding layer has only its last s
        positions. `orders` lists for each row the positions to copy, ascending. If `orders` has more rows than
        `parts`, each further row is filled from the last row of `parts`.
        """
        for buffer, part in zip(self.parts(), parts, strict=True):
            first = length - part.shape[2]
            for row, order in enumerate(orders):
                kept = order[order >= first].to(part.device)
                stop = len(order)
                buffer[row, :, stop - len(kept) : stop] = part[min(row, len(part) - 1), :, kept - first]

    def clear(self) -> None:
        """Set all keys and values to zero: a NaN or infinity would spread even from a slot that the mask hides."""
        self._settle()
        for store in self._stores:
            store.zero_()

    def grow(self, size: int) -> None:
        before = self.parts()
        self.reserve(before, self._rows, size)
        for buffer, part in zip(self.parts(), before, strict=True):
            buffer[:, :, : part.shape[2]] = part

    def move(self, slots: Tensor, to: Tensor) -> None:
        """Copy each row's keys and values from `slots` `[b, m]` to the slots `to` `[b, m]`, in all layers."""
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        for store in self._stores:
            store[:, rows, :, to] = store[:, rows, :, slots]

    def keep_rows(self, rows: list[int], length: int | None = None) -> None:
        """Move the first `length` slots of these rows to the first rows of the buffers, and drop all other rows."""
        if rows != list(range(len(rows))):
            order = torch.tensor(rows)
            for part in self.parts():
                order = order.to(part.device)  # once, unless layers lie on several devices
                part[: len(rows), :, :length] = part[:, :, :length].index_select(0, order)
        self._use(len(rows))

    def entries(self, slots: Tensor, first: int = 0) -> list[Tensor]:
        """Copy the keys and values in the slots of the CPU tensor `slots` `[b, s]`, for b rows from row `first` on.

        Returns each layer's keys, then values, `[b, kv heads, s, hd]`.
        """
        of_rows, length = slice(first, first + len(slots)), slots.shape[1]
        if bool((slots == torch.arange(length)).all()):  # one copy, and no gathering
            return [part[of_rows, :, :length].clone(memory_format=torch.contiguous_format) for part in self.parts()]
        found = []
        for part in self.parts():
            slots = slots.to(part.device)  # once, unless layers lie on several devices
            rows = torch.arange(of_rows.start, of_rows.stop, device=slots.device)[:, None]
            found.append(part[rows, :, slots].transpose(1, 2))
        return found

    def _use(self, rows: int) -> None:
        self._rows, self._parts = rows, {}


def _no_view(part: Tensor) -> Tensor:
    """Make a tensor that shares a CPU tensor's memory but is no view: compiled code would look up a view's base."""
    if part.device.type != "cpu":
        return part
    storage, start = part.untyped_storage(), part.storage_offset()
    return part.new_empty(0).set_(storage, start, part.shape, part.stride())  # type: ignore[call-overload, no-any-return]


def filled(cache: Cache) -> list[int]:
    """List the indices of a cache's layers with keys and values; a layer that uses another layer's keys has none."""
    return [index for index, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]


def parts_of(cache: Cache) -> list[Tensor]:
    """List a cache's keys and values: of each layer with entries, the keys, then the values."""
    layers = cache_layers(cache)
    return [part for index in filled(cache) for part in (layers[index].keys, layers[index].values)]


def give_back(parts: list[Tensor], cache: Cache, indices: list[int], length: int) -> None:
    """Set a cache's layers `indices` to `parts`: each layer's keys, then its values, `[b, kv heads, length, hd]`."""
    for index, keys, values in zip(indices, parts[::2], parts[1::2], strict=True):
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if getattr(layer, "keys", None) is None:
            cache.update(keys.contiguous(), values.contiguous(), index)
            continue
        kept = min(length, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else length
        replace_entries(layer, [part[:, :, length - kept :].contiguous() for part in (keys, values)], length)
