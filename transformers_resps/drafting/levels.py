"""The head over the levels of a tree, one after the other, below one text; and a whole draft as one function."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads import BoundHead, HeadCache, Rope
from ..tree import CandidatePool, DraftTree, TreeShape
from .pool_growth import Frontier, Growth, branch, grow_pool, sprout


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
        output = self.bound.run_layers(frontier.hidden, self.bound.embed(frontier.tokens), rope, attend)
        return branch(self.bound, frontier, output, is_last)

    def tensors(self, frontier: Frontier, level: int) -> tuple[list[Tensor], Sequence[Tensor]]:
        """All that a level depends on, each input laid out row by row, and the buffers of its cache."""
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


class DraftFunction:
    """Reads the newest pairs, grows a pool and builds its tree, without a decision on values in between.

    Every size is fixed by the shape, the number of pairs and the capacity of the head's cache; the text's length is a
    value. It gives what `TreeCandidateGenerator.draft` and `DraftTree.from_pool` give.

    `tree_room` is that of the head's cache, at least `(shape.depth - 1) * shape.top_k`.
    """

    def __init__(self, bound: BoundHead, shape: TreeShape, tree_room: int) -> None:
        self._bound, self._shape, self._tree_room = bound, shape, tree_room

    def __call__(
        self, features: Tensor, tokens: Tensor, slots: Tensor, shown: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, ...]:
        """Draft below the last of the tokens.

        Args:
            features: `[b, m, F]` of the newest m pairs, the newest last. A row that has fewer begins with any values.
            tokens: `[b, m]` of the pairs.
            slots: `[b, m]` where the pairs go, ascending. A pair that is none goes to the cache's last slot, which no
                text may reach.
            shown: `[b or 1, capacity or 1]` bool, false where a slot of the text is padding.
            keys: of the cache, written in place.
            values: likewise.

        Returns:
            The head's output `[b, 1, h]` at the newest pair, the tensors of `CandidatePool` without its levels, then
            those of `DraftTree`; see `unpack`.
        """
        head, cache, width = self._bound.head, HeadCache(keys, values, self._tree_room), tokens.shape[1]
        capacity, ends = cache.capacity, slots[:, -1:] + 1
        order = torch.arange(capacity, device=slots.device)
        ahead = torch.arange(max(self._shape.depth - 1, 1), device=slots.device)
        rope = head.rope(torch.cat([slots, ends + ahead], dim=1))
        queries = 1 if head.config.num_hidden_layers == 1 else width
        mask = (order <= slots[:, -queries:, None]) & shown[:, None]
        newest = self._bound.run_layers(
            self._bound.fuse(features),
            self._bound.embed(tokens),
            rope.at(slice(width)),
            cache.attend_at(slots, capacity, mask[:, None]),
            wanted=slice(-1, None),
        )
        text = (order < ends) & shown
        levels = LevelForward(self._bound, cache, rope.at(slice(width, None)), capacity, text)
        depth = self._shape.depth
        pool = grow_pool(sprout(self._bound, newest, self._shape.top_k, depth == 1), depth, levels)
        tree = DraftTree.from_pool(tokens[:, -1], pool, self._shape.total_tokens, depth)
        ranked = tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores
        return newest, pool.tokens, pool.parents, pool.scores, *ranked

    @staticmethod
    def scores(outputs: tuple[Tensor, ...]) -> Tensor:
        """The pool's, of what a call returns."""
        return outputs[3]

    def unpack(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, CandidatePool, DraftTree]:
        """The head's output, the pool and the tree that a call returns."""
        width, depth = min(self._shape.top_k, self._bound.head.config.proposable_tokens), self._shape.depth
        levels = torch.arange(1, depth + 1).repeat_interleave(torch.tensor([width] + [width**2] * (depth - 1)))
        newest, pool_tokens, pool_parents, pool_scores, tokens, parents, depths, ancestors, scores = outputs
        tree = DraftTree(tokens, parents, depths, ancestors, scores, min(depth, tokens.shape[1] - 1))
        return newest, CandidatePool(pool_tokens, pool_parents, pool_scores, levels), tree
