"""Copies of the states of a recurrent cache layer, for some rows of the batch, and their way back.

With `tree_cache`, `preallocated_cache` and `slot_cache` the only files that touch the inside of Transformers' caches.
"""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer


def holds_state(layer: Any) -> bool:
    """Whether a cache layer holds a recurrent or convolution state, perhaps beside keys and values."""
    return hasattr(layer, "recurrent_states")


def empty_like(cache: Cache) -> Cache:
    """A cache with as many layers, none of which holds anything."""
    layers: list[Any] = [DynamicLayer() for _ in cache.layers]
    return Cache(layers=layers)


def copied_rows(layer: Any, rows: Tensor) -> Any:
    """A layer with copies of the states of `rows` `[r]`; everything else is the layer's own."""
    branch = copy.copy(layer)
    branch.conv_states = {index: _selected(state, rows) for index, state in layer.conv_states.items()}
    branch.recurrent_states = {index: _selected(state, rows) for index, state in layer.recurrent_states.items()}
    branch.has_previous_state = dict(layer.has_previous_state)
    return branch


def settle_recorded(layer: Any) -> None:
    """Let a layer keep of its convolution states what the next token needs, if its owner let it record more."""
    if not layer.record_past:
        return
    layer.record_past = False
    for index, state in layer.conv_states.items():
        if state is not None:
            size = layer.conv_kernel_size[index]
            layer.conv_states[index] = pad(state, (max(size - state.shape[-1], 0), 0))[..., -size:].clone()


def write_back(layer: Any, branch: Any, places: Iterable[tuple[int, int]]) -> None:
    """Give rows of a layer the states of a branch, in place; `places` are pairs of a row and its place there."""
    parts = ((layer.conv_states, branch.conv_states), (layer.recurrent_states, branch.recurrent_states))
    pairs = [(own[index], found[index]) for own, found in parts for index in own if own[index] is not None]
    for row, place in places:
        for own, found in pairs:
            own[row].copy_(found[place])


def _selected(state: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if state is None else state.index_select(0, rows.to(state.device))
