"""Runs the head over the levels of a tree, one after the other, below one text."""

import torch
from torch import Tensor

from ..head import BoundHead, HeadCache, Rope
from .pool_growth import Frontier


class LevelForward:
    """One pass of the head over each level: all its nodes share a position and see only the text and their ancestors.

    What the levels have in common is computed once, before them.

    Args:
        bound: the head, with its target's embedding and output rows.
        cache: holds the text's entries, and room for those of the tree.
        rope: the angles of the levels' positions, `[b or 1, depth - 1]`.
        length: slots of the text.
        text: `[b or 1, length]` bool, true where a slot is seen; `None` where all are.
    """

    def __init__(self, bound: BoundHead, cache: HeadCache, rope: Rope, length: int, text: Tensor | None) -> None:
        self._bound, self._cache, self._rope, self._length, self._text = bound, cache, rope, length, text
        self._sharing = bound.head.config.num_attention_heads // bound.head.config.num_key_value_heads

    def __call__(self, frontier: Frontier, level: int) -> Tensor:
        """The output `[b, w, h]` over the nodes of `level` that get children."""
        entries = frontier.visible.shape[-1]
        rope = self._rope.at(slice(level - 1, level))
        attend = self._cache.attend_from(-entries, self._mask(frontier), end=self._length)
        return self._bound.head.run_layers(frontier.hidden, self._bound.embed(frontier.tokens), rope, attend)

    def _mask(self, frontier: Frontier) -> Tensor | None:
        """`[b, heads that share keys, w, e + w + length]`: one copy for all of these heads."""
        rows, width, _ = frontier.visible.shape
        if self._text is None:
            if width == 1:
                return None
            self._text = frontier.visible.new_ones(1, self._length)
        shape = (rows, self._sharing, width, -1)
        parts = frontier.visible[:, None], self._text[:, None, None]
        return torch.cat([part.expand(shape) for part in parts], dim=-1)
