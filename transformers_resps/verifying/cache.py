"""Functions for Transformers' caches that hold trees: grow in place, keep an accepted path, crop, pick and copy rows.

Most code that depends on the internals of these caches is here or in `slots`.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..compat import CacheLayer, cache_layers


_SPARE = 256  # unused positions at the end of a new buffer, so that it rarely grows
_MAX_SHARING = 8  # most layers in a buffer: with more, nodes move faster, but a growing buffer is in memory twice


class PreallocatedLayer(DynamicLayer):
    """A cache layer whose entries are the front of a larger buffer, so that a forward does not copy earlier entries.

    A new layer has the entries of the layer `stock`. Other code may crop the layer or replace its tensors.
    """

    buffer: "SharedBuffer"

    def __init__(self, stock: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _fill(self, stock.keys, stock.values)
        self._shown: Tensor | None = None  # the view of the buffer that was last set as `keys`

    def stock(self) -> DynamicLayer:
        layer = DynamicLayer()
        if self.is_initialized:
            _fill(layer, self.keys, self.values)
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append entries `[b, kv heads, t, hd]`, and return all keys and all values."""
        start, count = self.get_seq_length(), key_states.shape[-2]
        if not self.is_preallocated or self.buffer.size < start + count:
            _allocate(self.buffer.layers, start + count)
        keys, values = self._own
        keys.narrow(2, start, count).copy_(key_states)  # a third of the time of an assignment to a slice
        values.narrow(2, start, count).copy_(value_states)
        self._show(start + count)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest `-tokens_to_remove` positions; the argument is negative, as in Transformers."""
        was_preallocated = self.is_preallocated
        super().crop(tokens_to_remove)
        if was_preallocated:
            self._shown = self.keys

    @property
    def is_preallocated(self) -> bool:
        """Whether the entries still lie in the buffer; other code may have replaced them."""
        return self.keys is self._shown

    def move_to(self, buffer: "SharedBuffer", keys: Tensor, values: Tensor) -> None:
        """Change the storage to `keys` and `values` `[b, kv heads, size, hd]`, which already hold the old entries."""
        self.buffer, self._own = buffer, (keys, values)
        self._show(self.get_seq_length())

    def _show(self, length: int) -> None:
        keys, values = self._own
        self.keys = self._shown = keys.narrow(2, 0, length)
        self.values = values.narrow(2, 0, length)


class SharedBuffer:
    """Buffers `[layers, b, kv heads, size, hd]` for several layers' keys and values, to move nodes in all at once.

    `size` exceeds the length of every layer. Layers may have different lengths, and keys another `hd` than values.
    """

    def __init__(self, layers: list[Any], size: int) -> None:
        self.layers = layers
        self.size = size
        self.keys = _copied([layer.keys for layer in layers], size)
        self.values = _copied([layer.values for layer in layers], size)
        for layer, keys, values in zip(layers, self.keys, self.values, strict=True):
            layer.move_to(self, keys, values)

    def entries(self) -> list[Tensor] | None:
        """Return keys and values `[layers, b, kv heads, s, hd]`; `None` if a layer left the buffer or lengths vary."""
        lengths = {layer.get_seq_length() if layer.is_preallocated else None for layer in self.layers}
        if len(lengths) > 1 or None in lengths:
            return None
        (length,) = lengths
        return [self.keys[..., :length, :], self.values[..., :length, :]]


def preallocate(cache: Cache) -> None:
    """Replace all `DynamicLayer`s with entries by `PreallocatedLayer`s, which grow in place."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[index] = PreallocatedLayer(layer)
    _allocate([layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)], 0)


def restore_stock_layers(cache: Cache) -> None:
    """Replace all `PreallocatedLayer`s by `DynamicLayer`s, because the caller may reuse the cache."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PreallocatedLayer):
            cache.layers[index] = layer.stock()


def entries_of(layers: Iterable[CacheLayer]) -> Iterator[Tensor]:
    """Yield writable views `[any, b, kv heads, s, hd]` of keys and values, for each shared buffer or single layer."""
    buffers: dict[int, list[Tensor] | None] = {}
    for layer in layers:
        buffer = layer.buffer if isinstance(layer, PreallocatedLayer) else None
        if buffer is not None and id(buffer) not in buffers:
            buffers[id(buffer)] = buffer.entries()
            yield from buffers[id(buffer)] or ()
        if buffer is None or buffers[id(buffer)] is None:
            yield from (part[None] for part in _states(layer) or ())


def _allocate(layers: list[Any], length: int) -> None:
    """Move layers to new buffers for at least `length` positions; layers of equal shapes and dtypes share buffers."""
    alike = defaultdict(list)
    for layer in layers:
        kinds = [(part.shape[:2], part.shape[-1], part.dtype, part.device) for part in (layer.keys, layer.values)]
        alike[tuple(kinds)].append(layer)
    for found in alike.values():
        for start in range(0, len(found), _MAX_SHARING):
            sharing = found[start : start + _MAX_SHARING]
            SharedBuffer(sharing, max(length, *(layer.get_seq_length() for layer in sharing)) + _SPARE)


def _fill(layer: Any, keys: Any, values: Any) -> None:
    """Fill a layer without `lazy_initialization`, whose empty tensors make the host wait for an accelerator."""
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    layer.keys, layer.values = keys, values


def _copied(states: list[Tensor], length: int) -> Tensor:
    """Copy `states`, each `[b, kv heads, s, hd]`, to the front of a new tensor `[layers, b, kv heads, length, hd]`."""
    first = states[0]
    buffer = first.new_empty(len(states), *first.shape[:2], length, first.shape[-1])
    for row, part in zip(buffer, states, strict=True):
        row[:, :, : part.shape[-2]] = part
    return buffer


def holds_state(layer: Any) -> bool:
    """Whether a cache layer holds a recurrent or convolution state; it may hold keys and values, too."""
    return hasattr(layer, "recurrent_states")


# Layers that can hold trees, by exact type: subclasses such as QuantizedLayer keep more than keys and values.
_TREE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
_RECURRENT_LAYERS = ("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer")


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of `generate`, by its old or new name; `None` if there is none."""
    return arguments.get("cache", arguments.get("past_key_values"))


def check_cache(cache: Cache) -> None:
    """Raise a `ValueError` if a cache is offloaded, has no layers, or has layers that cannot hold a tree."""
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
    """Let sliding layers keep entries that leave their window, until `crop`; cut convolution states to kernel size."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if not holds_state(layer):
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        elif layer.record_past:  # states may have grown: cut them to the size that the next token needs
            layer.record_past = False
            for index, state in layer.conv_states.items():
                if state is not None:
                    size = layer.conv_kernel_size[index]
                    layer.conv_states[index] = pad(state, (max(size - state.shape[-1], 0), 0))[..., -size:].clone()


def stop_recording(cache: Cache) -> None:
    """Let sliding layers drop entries as soon as these leave the window, which is Transformers' default."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False


def crop_to(cache: Cache, length: int) -> None:
    """Cut each layer to its first `length` positions; after an interrupted forward, layers may differ in length."""
    layers = cache_layers(cache)
    for layer in layers:
        surplus = int(layer.get_seq_length()) - length if _states(layer) else 0
        if surplus > 0:
            _crop_entries(layer, surplus)


def cached_length(cache: Cache) -> int:
    """Return the number of positions that the cache has seen; sliding layers may have dropped some of them."""
    layers = getattr(cache, "layers", ())
    counting: Any = next((layer for layer in layers if isinstance(layer, CacheLayerMixin)), cache)
    return int(counting.get_seq_length())


def count_tokens(cache: Cache, length: int) -> None:
    """Set the number of tokens that recurrent layers have read: since Transformers 5.25 each layer counts them."""
    for layer in cache_layers(cache):
        if hasattr(layer, "cumulative_length_linear"):
            layer.cumulative_length_linear = torch.tensor(length, device=layer.device)


def crop(cache: Cache, count: int) -> None:
    """Drop the keys and values of the newest `count` positions; recurrent states stay.

    Sliding layers also drop the entries that `record_windows` let them keep, even if `count` is 0.
    """
    for layer in cache_layers(cache):
        _crop_entries(layer, count)


def _crop_entries(layer: CacheLayer, count: int) -> None:
    """Drop the newest `count` keys and values of a layer, unless it holds only a recurrent state."""
    if not holds_state(layer):
        layer.crop(-count)
    elif isinstance(layer, DynamicLayer):
        DynamicLayer.crop(layer, -count)


def visible_entries(cache: Cache, layer_index: int) -> tuple[Tensor, Tensor]:
    """Return a filled layer's keys and values `[b, kv heads, s, hd]` to which the next token attends."""
    layer, window = cache_layers(cache)[layer_index], window_of(cache, layer_index)
    start = 0 if window is None else max(layer.keys.shape[-2] + 1 - window, 0)
    return layer.keys[:, :, start:], layer.values[:, :, start:]


def window_of(cache: Cache, layer_index: int) -> int | None:
    """Return the size of a layer's sliding window; `None` if the layer has full attention."""
    layer = cache_layers(cache)[layer_index]
    return int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None


def _states(layer: CacheLayer) -> tuple[Tensor, Tensor] | None:
    """Return keys and values `[b, heads, s, hd]`; `None` if the layer is empty or uses another layer's keys."""
    keys = getattr(layer, "keys", None)
    return None if keys is None or not keys.numel() else (keys, layer.values)


def compact(cache: Cache, path: Tensor, node_count: int, *, is_front: bool = False) -> None:
    """Keep only the accepted path of a tree, whose nodes are the last `node_count` positions of a cache.

    `path` `[b, m]` holds ascending node indices, the root first. `is_front` says that every path is the first m nodes,
    so that no entry moves. Keys were rotated by depth, so a moved key needs no new rotation.
    """
    kept = path.shape[1]
    if 1 < kept < node_count and not is_front:
        for states in entries_of(cache_layers(cache)):
            _move_forward(states, path, states.shape[-2] - node_count)
    crop(cache, node_count - kept)


def compact_ragged(cache: Cache, path: Tensor, node_count: int, slots: Tensor, length: int) -> None:
    """Keep only each row's accepted path of a tree, for rows that end at different slots.

    A layer with full attention holds slot i's entry at index i; in a sliding layer all rows end at the last index.
    `path` `[b, m]` holds the kept nodes, the root first, and `slots` `[b, m]` their new slots, which are never later
    than their old slots. A row with fewer than m nodes repeats its last node. The longest row then has `length` slots.
    """
    surplus = cached_length(cache) - length
    counts = slots[:, -1] + 1 - slots[:, 0]
    rows = torch.arange(len(path), device=path.device)[:, None]
    layers = cache_layers(cache)
    full = [layer for index, layer in enumerate(layers) if window_of(cache, index) is None]
    for part in entries_of(full):  # whole entries: `gather` and `scatter_` of single numbers take six times as long
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
    """Keep only `rows` of a cache, and only the first `length` positions, at which the longest of these rows ends."""
    order, layers = torch.tensor(rows), cache_layers(cache)
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


def copied_row(cache: Cache, row: int, length: int) -> Cache:
    """Copy a row, which ends after `length` positions, to a new cache with Transformers' layers."""
    copied = copy.copy(cache)
    copied.layers = [_copied_row(layer, row, length) for layer in cache_layers(cache)]
    count_tokens(copied, length)
    stop_recording(copied)
    return copied


def _copied_row(layer: CacheLayer, row: int, length: int) -> Any:
    own: Any = layer.stock() if isinstance(layer, PreallocatedLayer) else copy.copy(layer)
    if holds_state(layer):
        own.has_previous_state = dict(layer.has_previous_state)
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name).items()
            setattr(own, name, {at: None if part is None else part[row : row + 1].clone() for at, part in held})
    states = _states(layer)
    if states is not None:
        size = states[0].shape[-2]
        start, end = 0, length
        if getattr(layer, "is_sliding", False):
            start, end = size - min(length, layer.sliding_window - 1), size
        replace_entries(own, [part[row : row + 1, :, start:end].clone() for part in states], length)
    return own


def joined_rows(caches: list[Cache]) -> Cache:
    """Append the rows of the other caches to the first cache, and return it; all caches have equal lengths."""
    for own, *others in zip(*map(cache_layers, caches), strict=True):
        rows = [own, *others]
        if holds_state(own):
            for name in ("conv_states", "recurrent_states"):
                states = {index: [getattr(row, name)[index] for row in rows] for index in getattr(own, name)}
                joined = {index: None if None in parts else torch.cat(parts) for index, parts in states.items()}
                setattr(own, name, joined)
        if _states(own) is not None:
            parts = [torch.cat([getattr(row, name) for row in rows]) for name in ("keys", "values")]
            replace_entries(own, parts, rows[0].get_seq_length())
    return caches[0]


def _newest(states: Tensor, path: Tensor, node_count: int, counts: Tensor, most: int) -> Tensor:
    """Gather each row's last `most` entries: first entries before the tree, then `counts` `[b]` nodes of the path."""
    past = states.shape[-2] - node_count
    order = torch.arange(most, device=path.device) + (past - most + counts)[:, None]  # [b, most]; nodes from `past` on
    nodes = path.gather(1, (order - past).clamp(0, path.shape[1] - 1))
    return states.gather(2, _along_positions(torch.where(order < past, order.clamp(min=0), past + nodes), states))


def replace_entries(layer: CacheLayer, states: list[Tensor], length: int) -> None:
    """Set a layer's keys and values to the two `states` `[b, heads, s, hd]`, for the last s of `length` positions."""
    layer.keys, layer.values = states
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


def _along_positions(positions: Tensor, states: Tensor) -> Tensor:
    """Expand positions `[b, m]` to an index `[b, heads, m, hd]` for `gather` from `states` `[b, heads, s, hd]`."""
    return positions.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])


def _move_forward(states: Tensor, path: Tensor, start: int) -> None:
    """Move the path's entries in `states` `[layers, b, heads, s, hd]` to the tree's first slots, from `start` on."""
    slots = path.to(states.device) + start
    if len(path) == 1:
        kept = states.index_select(3, slots[0])
    else:
        kept = states.gather(3, _along_positions(slots, states[0]).expand_as(states[..., : path.shape[1], :]))
    states[..., start : start + path.shape[1], :] = kept
