"""Drafting as one function of tensors: it can be compiled as a whole, or captured as one graph."""

import torch
from torch import Tensor

from ..head import BoundHead, HeadCache
from ..tree import CandidatePool, DraftTree, TreeShape
from .level_forward import LevelForward
from .pool_growth import grow_pool


class DraftFunction:
    """Reads the newest pairs, grows a pool and builds its tree, without a decision on values in between.

    Every size is fixed by the shape, the number of pairs and the capacity of the head's cache; the text's length is a
    value. It gives what `TreeCandidateGenerator.draft` and `DraftTree.from_pool` give.

    Args:
        bound: the head, with its target's embedding and output rows.
        shape: levels, children and nodes.
        tree_room: of the head's cache, at least `(shape.depth - 1) * shape.top_k`.
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
        newest = head.run_layers(
            head.fuse(features),
            self._bound.embed(tokens),
            rope.at(slice(width)),
            cache.attend_at(slots, capacity, mask[:, None]),
            wanted=slice(-1, None),
        )
        text = (order < ends) & shown
        levels = LevelForward(self._bound, cache, rope.at(slice(width, None)), capacity, text)
        pool = grow_pool(self._bound, newest, self._shape.top_k, self._shape.depth, levels)
        tree = DraftTree.from_pool(tokens[:, -1], pool, self._shape.total_tokens, self._shape.depth)
        ranked = tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores
        return newest, pool.tokens, pool.parents, pool.scores, *ranked

    def unpack(self, outputs: tuple[Tensor, ...]) -> tuple[CandidatePool, DraftTree]:
        """The pool and the tree that `outputs` hold."""
        width, depth = min(self._shape.top_k, self._bound.head.config.proposable_tokens), self._shape.depth
        levels = torch.arange(1, depth + 1).repeat_interleave(torch.tensor([width] + [width**2] * (depth - 1)))
        _, pool_tokens, pool_parents, pool_scores, tokens, parents, depths, ancestors, scores = outputs
        tree = DraftTree(tokens, parents, depths, ancestors, scores, min(depth, tokens.shape[1] - 1))
        return CandidatePool(pool_tokens, pool_parents, pool_scores, levels), tree
