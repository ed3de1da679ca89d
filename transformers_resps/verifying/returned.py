"""Make the cache that `generate` returns. It equals the cache of plain decoding: all rows are as long as the longest.

After a row has ended, plain decoding runs the target over the row's padding. Here the row's entries are copied when it
ends, and the target runs over its padding only if the caller reads the cache, which most callers never do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from ..compat import CACHE_KEYWORD
from .cache import cached_length, joined_rows, replace_entries
from .hybrids import is_recurrent


@dataclass(frozen=True, slots=True)
class EndedRow:
    """The cache of one row that has ended, and its next token's position ids `[planes]`: one, or several in M-RoPE."""

    cache: Cache
    position: Tensor

    def read(self, target: PreTrainedModel, tokens: Tensor, prompt_mask: Tensor | None) -> None:
        """Run the target over `tokens` `[1, t]`, the row's next tokens; one by one if the target is recurrent."""
        ahead = torch.arange(tokens.shape[1], device=tokens.device)
        positions = self.position.to(tokens.device)[:, None, None] + ahead  # [planes, 1, t]
        for part in ahead.split(1 if is_recurrent(target) else len(ahead)):
            length = cached_length(self.cache) + len(part)
            mask = None if prompt_mask is None else pad(prompt_mask, (0, length - prompt_mask.shape[1]), value=1)
            own = positions[..., part]
            target(
                input_ids=tokens[:, part],
                attention_mask=mask,
                position_ids=own[0] if len(own) == 1 else own,
                use_cache=True,
                **{CACHE_KEYWORD: self.cache},
            )


def whole_cache(
    target: PreTrainedModel, rows: Sequence[EndedRow], tokens: Tensor, prompt_mask: Tensor | None
) -> Cache:
    """Extend the cache of each shorter row by running the target over its padding; join the caches of all b rows.

    The rows' caches must not be used afterwards. `target` is in evaluation mode. `tokens` `[b, any]` are the last
    tokens of prompt and answer, with padding. `prompt_mask` `[b, s]` is 0 where the prompt has padding.
    """
    longest = max(cached_length(row.cache) for row in rows)
    with torch.no_grad():
        for index, row in enumerate(rows):
            missing = longest - cached_length(row.cache)
            if not missing:
                continue
            own = tokens[index : index + 1, tokens.shape[1] - 1 - missing : -1]  # no cache holds the newest token
            mask = None if prompt_mask is None else prompt_mask[index : index + 1]
            row.read(target, own.to(target.device), None if mask is None else mask.to(target.device))
        return joined_rows([row.cache for row in rows])


def dynamic_copy(static: StaticCache, config: PreTrainedConfig) -> DynamicCache:
    """Copy a static cache's entries into a new dynamic cache for the target with this `config`."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    layers: list[Any] = [*zip(cache.layers, static.layers, strict=True)]
    for layer, filled in layers:
        length = 0 if getattr(filled, "keys", None) is None else int(filled.get_seq_length())
        if length:
            end = min(length, filled.max_cache_len)
            start = max(end + 1 - layer.sliding_window, 0) if filled.is_sliding else 0
            keys, values = (part[:, :, start:end].clone() for part in (filled.keys, filled.values))
            layer.lazy_initialization(keys, values)
            replace_entries(layer, [keys, values], length)
    return cache


def fill_static(static: StaticCache, cache: Cache) -> StaticCache:
    """Replace the entries of `static` by the entries of the dynamic `cache`, which must not be longer; return it."""
    layers: list[Any] = [*zip(static.layers, cache.layers, strict=True)]
    for layer, filled in layers:
        if getattr(filled, "keys", None) is None:
            continue
        left = filled.get_seq_length() - filled.keys.shape[-2]  # entries that a sliding layer has forgotten
        keys, values = (pad(part, (0, 0, left, 0)) for part in (filled.keys, filled.values))
        if layer.is_initialized and layer.keys.shape[:2] == keys.shape[:2]:
            layer.reset()  # keeps the tensors that code was compiled for
        else:
            layer.lazy_initialization(keys, values)
        layer.update(keys, values)
    return static


class _Unread:
    """A cache that calls `make` when its layers are first read, and then has the layers of the returned cache."""

    def __init__(self, make: Callable[[], Cache]) -> None:
        self._make, self._lock = make, Lock()  # another thread may read `layers`, too, before it overwrites buffers
        self.offloading, self.layer_class_to_replicate = False, None

    @cached_property
    def layers(self) -> list[Any]:
        with self._lock:
            if "layers" not in vars(self):
                vars(self)["layers"] = self._make().layers
                del self._make  # frees what it holds
            return vars(self)["layers"]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle stores: the layers, which this call fills if needed."""
        return {"layers": self.layers, "offloading": False, "layer_class_to_replicate": None}


class UnreadDynamicCache(_Unread, DynamicCache):  # type: ignore[misc,override]  # `layers` are an attribute there
    """A `DynamicCache` that is filled when its layers are first read."""


class UnreadStaticCache(_Unread, StaticCache):  # type: ignore[misc,override]
    """A `StaticCache` that is filled when its layers are first read."""
