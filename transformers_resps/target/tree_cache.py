"""Keeps the accepted nodes of a tree in the target's cache, and refuses caches that cannot hold a tree.

With `preallocated_cache` and `slot_cache` the only files that touch the inside of Transformers' caches.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .preallocated_cache import entries_of
from .recurrent_states import holds_state, settle_recorded


# By exact type: subclasses such as QuantizedLayer or DynamicIndexedLayer keep more than keys and values.
_TREE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
_RECURRENT_LAYERS = ("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer")


def check_cache(cache: Cache) -> None:
    """Refuse a cache whose layers cannot hold a tree.

    Raises:
        ValueError: it has no layers, one of another type than the dynamic ones and our static ones, or is offloaded.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise ValueError(
            f"Draft trees need a decoder's `Cache` with layers, got a `{type(cache).__name__}`. Pass "
            "`DynamicCache(config=model.config)`, or no cache."
        )
    for layer in cache.layers:
        name = type(layer).__name__
        if name not in _TREE_LAYERS + _RECURRENT_LAYERS or not type(layer).__module__.startswith("transformers."):
            raise ValueError(
                f"The cache has a `{name}`, but only {', '.join(_TREE_LAYERS[:2])} can keep the accepted nodes of a "
                "tree. Leave out the cache and `cache_implementation`, or the head and the policy."
            )
    if getattr(cache, "offloading", False):
        raise ValueError(
            "Draft trees cannot use an offloaded cache. Leave out `cache_implementation='offloaded'`, or the head and "
            "the policy."
        )


def record_windows(cache: Cache) -> None:
    """Let sliding layers keep what leaves their window until the next `crop`; states are never recorded."""
    for layer in cache.layers:
        if holds_state(layer):
            settle_recorded(layer)
        elif hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()


def stop_recording(cache: Cache) -> None:
    """Let sliding layers forget at once what leaves their window, as in stock: the caller may reuse the cache."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False


def crop_to(cache: Cache, length: int) -> None:
    """Forget all but the first `length` positions of each layer; a forward may have been interrupted."""
    layers: list[Any] = cache.layers
    for layer in layers:
        surplus = int(layer.get_seq_length()) - length if _states(layer) else 0
        if surplus > 0:
            _crop_entries(layer, surplus)


def cached_length(cache: Cache) -> int:
    """Positions the cache has seen."""
    return int(cache.get_seq_length())


def crop(cache: Cache, count: int) -> None:
    """Forget the keys and values of the newest `count` positions; states stay.

    Sliding layers then forget what has left their window, also with 0.
    """
    for layer in cache.layers:
        _crop_entries(layer, count)


def _crop_entries(layer: Any, count: int) -> None:
    """Forget the newest `count` keys and values of a layer, which may hold a state beside them, or nothing else."""
    if not holds_state(layer):
        layer.crop(-count)
    elif isinstance(layer, DynamicLayer):
        DynamicLayer.crop(layer, -count)


def visible_length(cache: Cache, layer_index: int) -> int:
    """Past positions that layer `layer_index` still shows to a new token."""
    states = _states(cache.layers[layer_index])
    window = window_of(cache, layer_index)
    kept = states[0].shape[-2] if states else 0
    return kept if window is None else min(kept, window - 1)


def window_of(cache: Cache, layer_index: int) -> int | None:
    """The sliding window of a layer, or `None` where attention is full."""
    layer: Any = cache.layers[layer_index]
    return int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None


def has_windows(cache: Cache) -> bool:
    """Whether a layer slides."""
    return any(window_of(cache, index) is not None for index in range(len(cache.layers)))


def _states(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Keys and values `[b, heads, s, hd]`, or `None` for a layer that holds none (yet, or because it shares)."""
    keys = getattr(layer, "keys", None)
    return None if keys is None or not keys.numel() else (keys, layer.values)


def compact(cache: Cache, path: Tensor, node_count: int, *, is_front: bool = False) -> None:
    """Keep, of the last `node_count` positions, those of the accepted path.

    Args:
        cache: right after the tree's forward.
        path: `[b, m]` ascending node indices, the root first.
        node_count: nodes of the tree, padding included.
        is_front: whether every path is known to hold the first nodes in their order, so that nothing moves.

    Rotary positions were applied by depth, so a moved entry needs no rotation.
    """
    kept = path.shape[1]
    if 1 < kept < node_count and not is_front:
        for states in entries_of(cache.layers):
            _move_forward(states, path, states.shape[-2] - node_count)
    crop(cache, node_count - kept)


def compact_ragged(cache: Cache, path: Tensor, node_count: int, slots: Tensor, length: int) -> None:
    """Keep the accepted path of every row at slots of its own; for rows that end at different slots.

    A layer with full attention holds the entry of slot i at i. A sliding one holds the last of every row, whatever
    their slots: all rows end where the layer ends, as they do while their lengths are equal.

    Args:
        cache: right after the tree's forward.
        path: `[b, m]` node indices, the root first; a row that keeps fewer repeats its last.
        node_count: nodes of the tree.
        slots: `[b, m]` where each of them goes, none above where it stands.
        length: positions to keep: those of the longest row.
    """
    surplus = cached_length(cache) - length
    counts = slots[:, -1] + 1 - slots[:, 0]
    rows = torch.arange(len(path), device=path.device)[:, None]
    layers: list[Any] = cache.layers
    full = [layer for index, layer in enumerate(layers) if window_of(cache, index) is None]
    for part in entries_of(full):  # whole entries, a sixth of what `gather` and `scatter_` take for single numbers
        own, to, nodes = (index.to(part.device) for index in (rows, slots, path))  # layers may lie on several devices
        part[:, own, :, to] = part[:, own, :, nodes + (part.shape[-2] - node_count)]
    for index, layer in enumerate(layers):
        states, window = _states(layer), window_of(cache, index)
        if states is not None and window is not None:
            most = min(length, window - 1)
            replace_entries(layer, [_newest(part, path, node_count, counts, most) for part in states], length)
        elif states is not None:
            _crop_entries(layer, surplus)


def keep_rows(cache: Cache, rows: list[int], length: int) -> None:
    """Forget all rows but `rows`, of which the longest has `length` positions."""
    order, layers = torch.tensor(rows), list[Any](cache.layers)
    for layer in layers:
        states = _states(layer)
        order = order if states is None else order.to(states[0].device)  # once, unless layers lie on several devices
        (layer.reorder_cache if holds_state(layer) else layer.batch_select_indices)(order)
    surplus = cached_length(cache) - length
    for index, layer in enumerate(layers if surplus else []):
        states, window = _states(layer), window_of(cache, index)
        if states is not None and window is not None:
            most = min(length, window - 1)
            replace_entries(layer, [part[:, :, part.shape[-2] - most :] for part in states], length)
        elif states is not None:
            _crop_entries(layer, surplus)


def _newest(states: Tensor, path: Tensor, node_count: int, counts: Tensor, most: int) -> Tensor:
    """The last `most` entries of every row: what was there before the tree, then `counts` nodes of its path."""
    past = states.shape[-2] - node_count
    order = torch.arange(most, device=path.device) + (past - most + counts)[:, None]  # [b, most]; past on: the path
    nodes = path.gather(1, (order - past).clamp(0, path.shape[1] - 1))
    return states.gather(2, _along_positions(torch.where(order < past, order.clamp(min=0), past + nodes), states))


def replace_entries(layer: Any, states: list[Tensor], length: int) -> None:
    """Give a layer other entries `[b, heads, s, hd]`, in a sliding one the last of `length` positions."""
    layer.keys, layer.values = states
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


def _along_positions(positions: Tensor, states: Tensor) -> Tensor:
    """Positions `[b, m]` as an index into `[b, heads, s, hd]`."""
    return positions.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])


def _move_forward(states: Tensor, path: Tensor, start: int) -> None:
    """Gather the path's entries of `[layers, b, heads, s, hd]` to the front of the tree, from slot `start` on."""
    slots = path.to(states.device) + start
    if len(path) == 1:
        kept = states.index_select(3, slots[0])
    else:
        kept = states.gather(3, _along_positions(slots, states[0]).expand_as(states[..., : path.shape[1], :]))
    states[..., start : start + path.shape[1], :] = kept
