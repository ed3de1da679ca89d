"""Static caches: buffers of one size, in which the nodes of a tree follow the committed positions."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from ..tree import DraftTree
from .tree_cache import check_cache, window_of


# Slots after the longest text, for its last trees. A larger tree is cut there, which costs speed only.
_SPARE = 64


class StaticWindowLayer(StaticLayer):
    """The buffer of a layer with a sliding window: it holds every position, and the mask hides what left the window.

    Transformers' own `StaticSlidingWindowLayer` holds the window alone, and what a rejected node pushed out of it
    would be lost. This one takes the memory of a layer with full attention.

    Args:
        max_cache_len: slots.
        sliding_window: how many positions a token sees, itself included.
    """

    is_sliding = True

    def __init__(self, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.sliding_window = sliding_window


def static_cache(config: PretrainedConfig, given: Cache, max_length: int) -> Cache:
    """Make an empty static cache for a text and its trees.

    Args:
        config: the target's.
        given: what `generate` made. Its size counts: it never shrinks from call to call, so that a compiled forward
            sees one shape.
        max_length: positions that the text may reach.

    Raises:
        ValueError: the target has a layer that cannot hold a tree.
    """
    dynamic = DynamicCache(config=config.get_text_config(decoder=True))
    check_cache(dynamic)
    lengths = [layer.max_cache_len for layer in given.layers if isinstance(layer, StaticLayer)]
    size = max(max_length - 1, *lengths) + _SPARE  # the newest token is in no cache
    return Cache(
        layers=[_buffer(layer, window_of(dynamic, index), size) for index, layer in enumerate(dynamic.layers)]
    )


def let_buffers_change(cache: Cache) -> None:
    """Let code that was compiled with these buffers serve the next call's too.

    PyTorch 2.9 would expect the same buffers, and compile again at every call.
    """
    for layer in cache.layers:
        if isinstance(layer, StaticLayer) and layer.is_initialized:
            for buffer in (layer.keys, layer.values, layer.cumulative_length):
                torch._dynamo.mark_static_address(buffer, guard=False)


def _buffer(layer: Any, window: int | None, size: int) -> Any:
    """Make what stands for a dynamic layer. A layer that shares another one's keys has none of its own."""
    if window is not None:
        return StaticWindowLayer(size, window)
    return StaticLayer(size) if isinstance(layer, CacheLayerMixin) else layer


class Buckets:
    """Pads trees to powers of two, so that a compiled target sees few sizes.

    Args:
        slots: of the static cache; `None` for a cache that grows, where trees stay as they are.
    """

    def __init__(self, slots: int | None) -> None:
        self.slots = slots

    def rows(self, tree: DraftTree) -> int:
        """Rows of the forward over `tree`: its nodes and padding."""
        return tree.node_count if self.slots is None else 1 << (tree.node_count - 1).bit_length()

    def padded(self, tree: DraftTree) -> DraftTree:
        """What the target's forward gets."""
        return tree.padded(self.rows(tree))

    def fitted(self, tree: DraftTree, filled: int) -> DraftTree:
        """The first nodes, as many as fit with their padding after `filled` slots; at least one slot must be left."""
        if self.slots is None or self.rows(tree) <= self.slots - filled:
            return tree
        return tree.first(1 << (self.slots - filled).bit_length() - 1)
