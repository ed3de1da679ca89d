"""Runs the head over the levels of a tree, one after the other, below one text."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..head import BoundHead, HeadCache, Rope
from .pool_growth import Frontier, Growth, branch


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
        self.bound, self.cache, self._rope, self._length, self._text = bound, cache, rope, length, text
        self._sharing = bound.head.config.num_attention_heads // bound.head.config.num_key_value_heads

    def __call__(self, frontier: Frontier, level: int, is_last: bool) -> Growth:
        """The children of the nodes of `level` that get some; see `branch`."""
        entries = frontier.visible.shape[-1]
        rope = self._rope.at(slice(level - 1, level))
        attend = self.cache.attend_from(-entries, self._mask(frontier), end=self._length)
        output = self.bound.head.run_layers(frontier.hidden, self.bound.embed(frontier.tokens), rope, attend)
        return branch(self.bound, frontier, output, is_last)

    def tensors(self, frontier: Frontier, level: int) -> tuple[list[Tensor], Sequence[Tensor]]:
        """All that a level depends on: the inputs of `level_function`, each laid out row by row, and its buffers."""
        tokens, scores, hidden, visible = frontier
        text = self._seen(frontier)
        # Sizes of one, and as many entries as nodes, would be compiled apart: an entry is added that no node sees.
        if level == 1:
            visible = F.pad(visible, (0, 1))
        if text.shape[1] == 1:
            text = F.pad(text, (0, 1))
        shared = *self._rope.at(slice(level - 1, level)), text[:, None]
        inputs = [tokens, scores, hidden, visible, *(part.expand(len(tokens), -1, -1) for part in shared)]
        return [part.clone(memory_format=torch.contiguous_format) for part in inputs], self.cache.buffers

    def _mask(self, frontier: Frontier) -> Tensor | None:
        """`[b, heads that share keys, w, e + w + length]`: one copy for all of these heads."""
        rows, width, _ = frontier.visible.shape
        if self._text is None and width == 1:
            return None
        shape = (rows, self._sharing, width, -1)
        parts = frontier.visible[:, None], self._seen(frontier)[:, None, None]
        return torch.cat([part.expand(shape) for part in parts], dim=-1)

    def _seen(self, frontier: Frontier) -> Tensor:
        """`[b or 1, length]` bool, true where a slot is seen."""
        if self._text is None:
            self._text = frontier.visible.new_ones(1, self._length)
        return self._text


def level_function(bound: BoundHead, tree_room: int) -> Callable[..., Growth]:
    """A level as a function of tensors, for trees and texts of all sizes.

    Args:
        bound: the head, with its target's embedding and output rows.
        tree_room: of the cache whose buffers are passed.
    """

    def level(
        tokens: Tensor,
        scores: Tensor,
        hidden: Tensor,
        visible: Tensor,
        cosine: Tensor,
        sine: Tensor,
        text: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Growth:
        cache, text = HeadCache(keys, values, tree_room), text[:, 0]
        forward = LevelForward(bound, cache, Rope(cosine, sine), text.shape[1], text)
        return forward(Frontier(tokens, scores, hidden, visible), 1, False)

    return level
