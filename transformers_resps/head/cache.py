"""The head's own keys and values: entries of true features, followed by those of the tree being drafted."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..target.gqa_attention import attend
from .configuration import DraftHeadConfig
from .layer import Attend


_GROWTH = 256  # positions added when the buffer is full


class HeadCache:
    """Preallocated keys and values of every head layer; the caller keeps track of what each slot holds.

    Entries of a tree are written after those that come from the target's features, and simply overwritten later
    (EAGLE's stable keys), so dropping a tree costs nothing. Buffers start as zeros: a masked slot may be read.
    """

    def __init__(self, config: DraftHeadConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        assert config.head_dim is not None
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, _GROWTH, config.head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def reserve(self, length: int) -> None:
        """Make room for `length` positions, keeping what is there."""
        missing = length - self._keys.shape[3]
        if missing > 0:
            extra = (*self._keys.shape[:3], missing + _GROWTH, self._keys.shape[4])
            self._keys = torch.cat([self._keys, self._keys.new_zeros(extra)], dim=3)
            self._values = torch.cat([self._values, self._values.new_zeros(extra)], dim=3)

    def attend_from(self, start: int, mask: Tensor | None, *, is_causal: bool = False) -> Attend:
        """Attention that writes its keys at `[start, start + t)` and sees all entries before their end.

        Args:
            start: where the new entries go.
            mask: `[b or 1, 1, t, start + t]` bool, true where attended; `None` sees everything.
            is_causal: instead of a mask, for `start == 0`.

        Fewer queries than keys mean that only the newest position has a query.
        """

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            end = start + keys.shape[2]
            self._keys[layer, :, :, start:end] = keys
            self._values[layer, :, :, start:end] = values
            newest_only = queries.shape[2] < keys.shape[2]  # the last query sees everything
            return self._attended(layer, queries, end, mask, is_causal=is_causal and not newest_only)

        return attend

    def attend_at(self, slots: Tensor, end: int, mask: Tensor) -> Attend:
        """As `attend_from`, but keys are written at each row's own `slots` `[b, t]`, and those before `end` seen."""

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            for kept, states in ((self._keys[layer], keys), (self._values[layer], values)):
                kept.scatter_(2, slots[:, None, :, None].expand_as(states), states)
            return self._attended(layer, queries, end, mask)

        return attend

    def _attended(
        self, layer: int, queries: Tensor, end: int, mask: Tensor | None, *, is_causal: bool = False
    ) -> Tensor:
        keys, values = self._keys[layer, :, :, :end], self._values[layer, :, :, :end]
        if is_causal:
            grouped = keys.shape[1] != queries.shape[1]
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
        return attend(queries, keys, values, mask if mask is None else mask[:, :, -queries.shape[2] :])

    def keep_rows(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self._keys, self._values = self._keys[:, rows], self._values[:, rows]
