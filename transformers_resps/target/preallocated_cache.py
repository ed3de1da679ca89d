"""A preallocated cache: full-attention layers with room after their entries, so that a forward copies no past.

Transformers' `DynamicLayer` makes new tensors of all its entries at every forward, for nodes that are mostly dropped
again. Several layers share a tensor, so that the nodes to keep move in all of them at once.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


_ROOM = 256  # positions added when no room is left
_SHARING = 8  # layers of one tensor: more would move faster, but while they grow, all their past is there twice


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the front of larger tensors. Other code may shorten it or replace its
    tensors, as with any `DynamicLayer`.
    """

    _room: "Room"
    _wide: tuple[Tensor, Tensor]  # its own part of the room, `[b, kv heads, size, hd]` each
    _front: Tensor | None  # the keys as they were last seen in the room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[b, kv heads, t, hd]` entries; returns all keys and all values."""
        start, count = self.get_seq_length(), key_states.shape[-2]
        if not self.is_in_room or self._room.size < start + count:
            self._room.move_out(start + count)
        keys, values = self._wide
        keys.narrow(2, start, count).copy_(key_states)  # a third of the time of an assignment to a slice
        values.narrow(2, start, count).copy_(value_states)
        self.show(start + count)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` positions."""
        in_room = self.is_in_room
        super().crop(tokens_to_remove)
        if in_room:
            self._front = self.keys

    @property
    def is_in_room(self) -> bool:
        """Whether the entries still are those in the room, and were not replaced."""
        return self.keys is self._front

    def show(self, length: int) -> None:
        """Hold the first `length` entries of the room."""
        keys, values = self._wide
        self.keys = self._front = keys.narrow(2, 0, length)
        self.values = values.narrow(2, 0, length)


class Room:
    """Entries of several layers with space after them.

    Args:
        layers: filled, with entries of the same sizes, lengths apart; they move in.
        size: positions.

    Attributes:
        keys: `[layers, b, kv heads, s, hd]`.
        values: like `keys`; `hd` may differ.
    """

    def __init__(self, layers: list[Any], size: int) -> None:
        self._layers = layers
        self.size = size
        self.keys = _wide([layer.keys for layer in layers], size)
        self.values = _wide([layer.values for layer in layers], size)
        for place, layer in enumerate(layers):
            layer.__class__ = RoomyLayer
            layer._room, layer._wide = self, (self.keys[place], self.values[place])
            layer.show(layer.get_seq_length())

    def move_out(self, length: int) -> None:
        """Move all layers to rooms for `length` positions and more, together where they still can."""
        _furnish(self._layers, length)

    def entries(self) -> list[Tensor] | None:
        """All entries, `[layers, b, kv heads, s, hd]`; `None` where some are elsewhere, or longer than others."""
        lengths = {layer.get_seq_length() if layer.is_in_room else None for layer in self._layers}
        if len(lengths) > 1 or None in lengths:
            return None
        (length,) = lengths
        return [self.keys[..., :length, :], self.values[..., :length, :]]


def make_room(cache: Cache) -> None:
    """Let the layers of a filled cache that attend to everything grow in place."""
    _furnish([layer for layer in cache.layers if type(layer) is DynamicLayer and layer.get_seq_length()], 0)


def settle(cache: Cache) -> None:
    """Turn them into stock layers again: the caller may reuse the cache."""
    for layer in cache.layers:
        if type(layer) is RoomyLayer:
            for name in ("_room", "_wide", "_front"):
                delattr(layer, name)
            layer.__class__ = DynamicLayer  # type: ignore[assignment]  # its own class


def entries_of(layers: Iterable[Any]) -> Iterator[Tensor]:
    """Every entry of filled layers once, as few tensors `[layers, b, kv heads, s, hd]` as hold them. Writing to them
    changes the layers.
    """
    rooms: dict[int, list[Tensor] | None] = {}
    for layer in layers:
        room = layer._room if isinstance(layer, RoomyLayer) else None
        if room is not None and id(room) not in rooms:
            rooms[id(room)] = room.entries()
            yield from rooms[id(room)] or ()
        if room is None or rooms[id(room)] is None:
            yield from _own_entries(layer)


def _own_entries(layer: Any) -> Iterator[Tensor]:
    """Keys and values `[1, b, kv heads, s, hd]`; a layer may hold none."""
    for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
        if part is not None and part.numel():
            yield part[None]


def _furnish(layers: list[Any], length: int) -> None:
    """Give layers rooms for `length` positions and more, in their order; in one room all entries are of one kind."""
    alike = defaultdict(list)
    for layer in layers:
        kinds = [(part.shape[:2], part.shape[-1], part.dtype, part.device) for part in (layer.keys, layer.values)]
        alike[tuple(kinds)].append(layer)
    for found in alike.values():
        for start in range(0, len(found), _SHARING):
            sharing = found[start : start + _SHARING]
            Room(sharing, max(length, *(layer.get_seq_length() for layer in sharing)) + _ROOM)


def _wide(states: list[Tensor], length: int) -> Tensor:
    """Copies of `states`, each `[b, kv heads, s, hd]`, at the front of `[layers, b, kv heads, length, hd]`."""
    first = states[0]
    buffer = first.new_empty(len(states), *first.shape[:2], length, first.shape[-1])
    for row, part in zip(buffer, states, strict=True):
        row[:, :, : part.shape[-2]] = part
    return buffer
