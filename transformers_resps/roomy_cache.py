"""Full-attention layers of a cache with room behind their entries: a forward writes there, and copies no past.

Transformers' `DynamicLayer` makes new tensors of all its entries at every forward, for nodes that are mostly forgotten
again. Knows Transformers' cache layers; nothing of trees.
"""

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


_ROOM = 256  # positions added when there is none left


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the front of larger tensors. Whoever shortens it, or replaces its
    tensors, need not know.
    """

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[b, kv heads, t, hd]` entries; returns all keys and all values."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        keys, values = self._with_room(end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _with_room(self, length: int) -> tuple[Tensor, Tensor]:
        """Tensors that begin with the present entries and have room for `length`."""
        assert self.keys is not None and self.values is not None  # see `make_room`
        kept = self._buffers
        if kept is None or kept[0].shape[-2] < length or not _begin(kept, (self.keys, self.values)):
            kept = self._buffers = _widened(self.keys, length + _ROOM), _widened(self.values, length + _ROOM)
        return kept


def make_room(cache: Cache) -> None:
    """Let the layers of a filled cache that attend to everything grow in place."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer and layer.get_seq_length():
            layer.__class__ = RoomyLayer


def settle(cache: Cache) -> None:
    """Make stock layers of them again: the caller may go on with the cache."""
    for layer in cache.layers:
        if type(layer) is RoomyLayer:
            vars(layer).pop("_buffers", None)
            layer.__class__ = DynamicLayer  # type: ignore[assignment]  # its own class


def _begin(buffers: tuple[Tensor, Tensor], states: tuple[Tensor, Tensor]) -> bool:
    """Whether `states` are the fronts of `buffers`, not copies that somebody made of them."""
    return all(
        whole.data_ptr() == front.data_ptr()
        and whole.shape[:2] == front.shape[:2]
        and whole.stride() == front.stride()
        for whole, front in zip(buffers, states, strict=True)
    )


def _widened(states: Tensor, length: int) -> Tensor:
    buffer = states.new_empty(*states.shape[:2], length, states.shape[-1])
    buffer[:, :, : states.shape[-2]] = states
    return buffer
