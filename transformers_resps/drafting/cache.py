"""The KV cache of a draft model, and `Entries`, through which a forward pass writes to the cache and reads it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..verifying.attention import attend


_GROWTH = 256  # Positions that are added when the buffers are full.
_TREE_ROOM = 128  # Slots for a tree in a new cache.


class Entries(ABC):
    """Stores keys and values of a forward pass's tokens, and returns all keys and values that the tokens attend to.

    Layers of Transformers get this object as their cache, and `mask` as their attention mask.
    """

    # `[b or 1, 1, q, s]` bool over the s entries that `update` returns, true where a query attends; `None` for plain
    # causal attention, or if a single query attends to all entries
    mask: Tensor | None = None
    first_slot: int = 0  # slot (index in the cache) of the first of the s entries; the text is in slots 0, 1, ...
    is_compileable: bool = False  # read by models of Transformers

    @abstractmethod
    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values `[b, kv heads, t, hd]`; return all keys and values that the tokens may attend to."""

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store t tokens' keys and values; return attention `[b, heads, q, hd]` for `queries` of the last q tokens."""
        mask = None if self.mask is None else self.mask[:, :, -queries.shape[2] :]
        return attend(queries, *self.update(keys, values, layer), mask)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0. Models of Transformers call this, but do not need it, since they get positions and a mask."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return 0. Models of Transformers call this if `mask` is `None`."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return length and offset of a mask over this pass's tokens. Transformers calls this if `mask` is `None`."""
        return query_length, 0


class DraftCache:
    """Preallocated buffers for the keys and values of every layer. A slot is an index in the buffers.

    The caller tracks what each slot holds. The text is in the slots 0, 1, ...; a draft tree is in negative slots, so
    it need not move while the text grows. Each tree overwrites the previous one, as in EAGLE's code, so to drop a tree
    costs nothing. Buffers start as zeros, because attention also reads masked slots.

    `buffers` `[b, kv heads, tree_room + capacity, hd]` are keys and values of each layer in turn; negative slots come
    first. A layer without buffers gets them at its first write. Without buffers, masks are made on `device`.
    """

    def __init__(
        self, buffers: Sequence[Tensor] = (), tree_room: int = _TREE_ROOM, device: torch.device | str = "cpu"
    ) -> None:
        self._layers = dict(enumerate(zip(buffers[::2], buffers[1::2], strict=True)))
        self.tree_room = tree_room  # number of slots for a tree
        self.capacity = buffers[0].shape[2] - tree_room if buffers else _GROWTH  # number of slots for the text
        self.device = buffers[0].device if buffers else torch.device(device)
        self._true: Tensor | None = None

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Buffers of keys and values of each layer in turn, without layers that have stored nothing yet."""
        return tuple(part for _, pair in sorted(self._layers.items()) for part in pair)

    def reserve(self, length: int, tree: int = 0) -> None:
        """Grow the buffers, if needed, to hold `length` positions of the text and `tree` nodes; contents are kept."""
        more = length - self.capacity + _GROWTH if length > self.capacity else 0
        ahead = max(tree - self.tree_room, 0)
        if more or ahead:
            self._layers = {
                layer: (F.pad(keys, (0, 0, ahead, more)), F.pad(values, (0, 0, ahead, more)))
                for layer, (keys, values) in self._layers.items()
            }
            self.capacity, self.tree_room = self.capacity + more, self.tree_room + ahead

    def forget(self, count: int, length: int) -> None:
        """Drop the first `count` of the text's `length` keys and values; move the later ones to begin at slot 0."""
        room = self.tree_room
        for kept in self.buffers if count < length else ():
            kept[:, :, room : room + length - count] = kept[:, :, room + count : room + length].clone()

    def attend(
        self,
        where: int | Tensor,
        end: int,
        *,
        seen: Tensor | None = None,
        drafted: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Entries:
        """Return the `Entries` through which the layers of one pass write to this cache and read from it.

        The text has the slots from 0 on, and a tree of e nodes the slots -e to -1.

        Args:
            where: the slot of the first token in every row, or the slots `[b or 1, t]` of all tokens.
            end: the first slot of the text to which no token attends.
            seen: `[b or 1, end]`, false for a slot to which only its own token attends; `None` hides no slot.
            drafted: `[b, t, e]`, whether each token attends to each node. Without it and `mask`, the tokens belong to
                the text and attend causally.
            mask: `[b or 1, 1, q, s]` over the slots from `min(where, 0)` to `end`, in place of a mask made from the
                other arguments. If a layer has q queries and more keys, the queries belong to the last tokens.
        """
        return _CacheEntries(self, where, end, seen, drafted, mask)

    def all_seen(self, length: int) -> Tensor:
        """Return a bool mask `[1, length]` that is true everywhere."""
        if self._true is None:
            self._true = torch.ones(1, 1, dtype=torch.bool, device=self.device)
        return self._true.expand(1, length)

    def of_layer(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's two buffers, made for `keys` and `values` if missing. Slot i has index `tree_room + i`."""
        if layer not in self._layers:
            slots = self.tree_room + self.capacity
            made = [part.new_zeros(*part.shape[:2], slots, part.shape[3]) for part in (keys, values)]
            self._layers[layer] = made[0], made[1]
        return self._layers[layer]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows except `rows`, `[r]` indices on the cache's device."""
        self._layers = {
            layer: (keys.index_select(0, rows), values.index_select(0, rows))
            for layer, (keys, values) in self._layers.items()
        }


class _CacheEntries(Entries):
    """The `Entries` that `DraftCache.attend` returns. They make the mask once, for the first layer that needs it."""

    def __init__(
        self,
        cache: DraftCache,
        where: int | Tensor,
        end: int,
        seen: Tensor | None,
        drafted: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        self._cache, self._where, self._end, self._made = cache, where, end, mask
        self._seen, self._drafted = seen, drafted
        self.first_slot = 0 if isinstance(where, Tensor) else min(where, 0)

    @property
    def mask(self) -> Tensor | None:  # type: ignore[override]  # made at the first access
        if self._drafted is not None:
            return self._mask_of(self._drafted.shape[1])
        return self._mask_of(self._where.shape[1] if isinstance(self._where, Tensor) else self._end - self._where)

    def _mask_of(self, queries: int, copies: int = 1) -> Tensor | None:
        """Return a mask `[b or 1, 1 or copies, queries, s]` for the pass's last tokens over s slots; `None` if none is
        needed. A tree's mask is repeated `copies` times, once for each query head that shares a key head.
        """
        if self._made is None:
            if self._seen is None and self._is_plain(queries):
                return None
            self._made = self._tree_mask(queries, copies) if self._drafted is not None else self._text_mask(queries)
        return self._made[:, :, -queries:]

    def _is_plain(self, queries: int) -> bool:
        """Whether no mask is needed: a single query attends to all keys, or a causal pass begins at slot 0."""
        if self._drafted is not None:
            return queries == 1
        return not isinstance(self._where, Tensor) and (queries == 1 or self._where == 0)

    def _tree_mask(self, queries: int, copies: int) -> Tensor:
        assert self._drafted is not None
        seen = self._cache.all_seen(self._end) if self._seen is None else self._seen
        shape = (self._drafted.shape[0], copies, queries, -1)
        return torch.cat([part.expand(shape) for part in (self._drafted[:, None], seen[:, None, None])], dim=-1)

    def _text_mask(self, queries: int) -> Tensor:
        order = torch.arange(self._end, device=self._cache.device)
        own = (self._where[:, -queries:] if isinstance(self._where, Tensor) else order[None, -queries:])[..., None]
        mask = order <= own
        if self._seen is not None:  # a hidden token sees itself: without any key its output would be NaN
            mask = mask & self._seen[:, None] | (order == own)
        return mask[:, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        room, where, found = self._cache.tree_room, self._where, []
        for kept, part in zip(self._cache.of_layer(layer_idx, keys, values), (keys, values), strict=True):
            if isinstance(where, Tensor):
                kept.scatter_(2, (room + where)[:, None, :, None].expand_as(part), part)
            else:
                kept[:, :, room + where : room + where + part.shape[2]] = part
            found.append(kept[:, :, room + self.first_slot : room + self._end])
        return found[0], found[1]

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        (_, heads, count, _), (_, key_heads, tokens, _) = queries.shape, keys.shape
        keys, values = self.update(keys, values, layer)
        mask = self._mask_of(count, heads // key_heads)
        if mask is None and self._drafted is None and count == tokens > 1:
            shares = heads != key_heads
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=shares)
        return attend(queries, keys, values, mask)
