"""The head's own KV cache: entries of true features, and before them those of the tree being drafted."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..verifying.attention import attend
from .config import DraftHeadConfig
from .model import Attend


_GROWTH = 256  # positions added when the buffer is full
_TREE_ROOM = 128  # entries of a tree at first


class HeadCache:
    """Preallocated keys and values of every head layer; the caller knows what each slot holds.

    The sequence has the slots 0, 1, ..., a tree negative ones, so that both lie side by side and trees stay in place
    while the sequence grows. The next tree overwrites the last (EAGLE's stable keys), so dropping one costs nothing.
    Buffers start as zeros: a masked slot may be read.

    Args:
        keys: `[layers, b, kv heads, slots, hd]`.
        values: like `keys`.
        tree_room: how many of the slots, the first ones, are for a tree.
    """

    def __init__(self, keys: Tensor, values: Tensor, tree_room: int) -> None:
        self._keys, self._values, self._tree_room = keys, values, tree_room

    @classmethod
    def empty(cls, config: DraftHeadConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> "HeadCache":
        """For a head and a batch; `reserve` makes it grow."""
        assert config.head_dim is not None
        slots = _TREE_ROOM + _GROWTH
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, slots, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, _TREE_ROOM)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values, `[layers, b, kv heads, tree_room + capacity, hd]`."""
        return self._keys, self._values

    @property
    def rows(self) -> int:
        """Sequences of the batch."""
        return self._keys.shape[1]

    @property
    def tree_room(self) -> int:
        """Slots for a tree."""
        return self._tree_room

    @property
    def capacity(self) -> int:
        """Slots for the sequence."""
        return self._keys.shape[3] - self._tree_room

    def reserve(self, length: int, tree: int = 0) -> None:
        """Make room for `length` positions of the sequence, which is kept, and `tree` nodes."""
        missing = length - self.capacity
        if missing > 0:
            self._keys, self._values = (
                F.pad(kept, (0, 0, 0, missing + _GROWTH)) for kept in (self._keys, self._values)
            )
        missing = tree - self._tree_room
        if missing > 0:
            self._keys, self._values = (F.pad(kept, (0, 0, missing, 0)) for kept in (self._keys, self._values))
            self._tree_room = tree

    def attend_from(
        self, start: int, mask: Tensor | None, *, end: int | None = None, is_causal: bool = False
    ) -> Attend:
        """Attention that writes its keys at the slots `[start, start + t)`.

        Args:
            start: where the new entries go; below 0 for a tree.
            mask: `[b or 1, 1 or heads that share keys, t, s]` bool, true where attended; `None` sees everything. The s
                slots are those from 0, or from `start` if that is lower, to `end`.
            end: slot after the last that is seen; `start + t` when `None`.
            is_causal: instead of a mask, for `start == 0`.

        Fewer queries than keys mean that only the newest position has a query.
        """

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            stop = start + keys.shape[2]
            here = slice(self._tree_room + start, self._tree_room + stop)
            self._keys[layer, :, :, here] = keys
            self._values[layer, :, :, here] = values
            newest_only = queries.shape[2] < keys.shape[2]  # the last query sees everything
            seen = slice(min(start, 0), stop if end is None else end)
            return self._attended(layer, queries, seen, mask, is_causal=is_causal and not newest_only)

        return attend

    def attend_at(self, slots: Tensor, end: int, mask: Tensor) -> Attend:
        """As `attend_from`, but keys are written at each row's own `slots` `[b, t]`, and slots before `end` seen."""

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            here = (self._tree_room + slots)[:, None, :, None]
            for kept, states in ((self._keys[layer], keys), (self._values[layer], values)):
                kept.scatter_(2, here.expand_as(states), states)
            return self._attended(layer, queries, slice(0, end), mask)

        return attend

    def _attended(
        self, layer: int, queries: Tensor, seen: slice, mask: Tensor | None, *, is_causal: bool = False
    ) -> Tensor:
        seen = slice(self._tree_room + seen.start, self._tree_room + seen.stop)
        keys, values = self._keys[layer, :, :, seen], self._values[layer, :, :, seen]
        if is_causal:
            grouped = keys.shape[1] != queries.shape[1]
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
        return attend(queries, keys, values, mask if mask is None else mask[:, :, -queries.shape[2] :])

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but these, `[r]` on the cache's device."""
        self._keys, self._values = (kept.index_select(1, rows) for kept in (self._keys, self._values))
