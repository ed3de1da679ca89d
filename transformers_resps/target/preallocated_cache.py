"""A preallocated cache: full-attention layers with space after their entries, so that a forward copies no past.

Transformers' `DynamicLayer` makes new tensors of all its entries at every forward, for nodes that are mostly dropped
again. Several layers share a buffer, so that the nodes to keep move in all of them at once.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


_SPARE = 256  # positions allocated beyond what is needed
_MAX_SHARING = 8  # layers of one buffer: more would move faster, but while they grow, all their past is there twice


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the front of a larger buffer. Other code may shorten it or replace
    its tensors, as with any `DynamicLayer`.

    Args:
        stock: a filled layer, which this one stands for.
    """

    buffer: "SharedBuffer"

    def __init__(self, stock: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _fill(self, stock.keys, stock.values)
        self._shown: Tensor | None = None  # the keys as they were last seen in the buffer

    def stock(self) -> DynamicLayer:
        """A stock layer with the same tensors."""
        layer = DynamicLayer()
        if self.is_initialized:
            _fill(layer, self.keys, self.values)
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[b, kv heads, t, hd]` entries; returns all keys and all values."""
        start, count = self.get_seq_length(), key_states.shape[-2]
        if not self.is_preallocated or self.buffer.size < start + count:
            self.buffer.grow(start + count)
        keys, values = self._own
        keys.narrow(2, start, count).copy_(key_states)  # a third of the time of an assignment to a slice
        values.narrow(2, start, count).copy_(value_states)
        self._show(start + count)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` positions."""
        was_preallocated = self.is_preallocated
        super().crop(tokens_to_remove)
        if was_preallocated:
            self._shown = self.keys

    @property
    def is_preallocated(self) -> bool:
        """Whether the entries still are those in the buffer, and were not replaced."""
        return self.keys is self._shown

    def move_to(self, buffer: "SharedBuffer", keys: Tensor, values: Tensor) -> None:
        """Hold the entries in its own part of a buffer, `[b, kv heads, size, hd]` each; they have been copied."""
        self.buffer, self._own = buffer, (keys, values)
        self._show(self.get_seq_length())

    def _show(self, length: int) -> None:
        keys, values = self._own
        self.keys = self._shown = keys.narrow(2, 0, length)
        self.values = values.narrow(2, 0, length)


class SharedBuffer:
    """The entries of several layers, with space after them.

    Args:
        layers: with entries of the same sizes, lengths apart; they move in.
        size: positions.

    Attributes:
        keys: `[layers, b, kv heads, s, hd]`.
        values: like `keys`; `hd` may differ.
    """

    def __init__(self, layers: list[Any], size: int) -> None:
        self._layers = layers
        self.size = size
        self.keys = _copied([layer.keys for layer in layers], size)
        self.values = _copied([layer.values for layer in layers], size)
        for layer, keys, values in zip(layers, self.keys, self.values, strict=True):
            layer.move_to(self, keys, values)

    def grow(self, length: int) -> None:
        """Move all layers to buffers for `length` positions and more, together where they still can."""
        _allocate(self._layers, length)

    def entries(self) -> list[Tensor] | None:
        """All entries, `[layers, b, kv heads, s, hd]`; `None` where some are elsewhere, or longer than others."""
        lengths = {layer.get_seq_length() if layer.is_preallocated else None for layer in self._layers}
        if len(lengths) > 1 or None in lengths:
            return None
        (length,) = lengths
        return [self.keys[..., :length, :], self.values[..., :length, :]]


def preallocate(cache: Cache) -> None:
    """Let the layers of a filled cache that attend to everything grow in place."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[index] = PreallocatedLayer(layer)
    _allocate([layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)], 0)


def restore_stock_layers(cache: Cache) -> None:
    """Undo `preallocate`: the caller may reuse the cache."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PreallocatedLayer):
            cache.layers[index] = layer.stock()


def entries_of(layers: Iterable[Any]) -> Iterator[Tensor]:
    """Every entry of filled layers once, as few tensors `[layers, b, kv heads, s, hd]` as hold them. Writing to them
    changes the layers.
    """
    buffers: dict[int, list[Tensor] | None] = {}
    for layer in layers:
        buffer = layer.buffer if isinstance(layer, PreallocatedLayer) else None
        if buffer is not None and id(buffer) not in buffers:
            buffers[id(buffer)] = buffer.entries()
            yield from buffers[id(buffer)] or ()
        if buffer is None or buffers[id(buffer)] is None:
            yield from _own_entries(layer)


def _own_entries(layer: Any) -> Iterator[Tensor]:
    """Keys and values `[1, b, kv heads, s, hd]`; a layer may hold none."""
    for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
        if part is not None and part.numel():
            yield part[None]


def _allocate(layers: list[Any], length: int) -> None:
    """Give layers buffers for `length` positions and more, in their order; all entries of a buffer are of one kind."""
    alike = defaultdict(list)
    for layer in layers:
        kinds = [(part.shape[:2], part.shape[-1], part.dtype, part.device) for part in (layer.keys, layer.values)]
        alike[tuple(kinds)].append(layer)
    for found in alike.values():
        for start in range(0, len(found), _MAX_SHARING):
            sharing = found[start : start + _MAX_SHARING]
            SharedBuffer(sharing, max(length, *(layer.get_seq_length() for layer in sharing)) + _SPARE)


def _fill(layer: Any, keys: Any, values: Any) -> None:
    """As `lazy_initialization`, which would make empty tensors first: each waits for an accelerator."""
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    layer.keys, layer.values = keys, values


def _copied(states: list[Tensor], length: int) -> Tensor:
    """Copies of `states`, each `[b, kv heads, s, hd]`, at the front of `[layers, b, kv heads, length, hd]`."""
    first = states[0]
    buffer = first.new_empty(len(states), *first.shape[:2], length, first.shape[-1])
    for row, part in zip(buffer, states, strict=True):
        row[:, :, : part.shape[-2]] = part
    return buffer
