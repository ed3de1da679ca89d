"""Draft a tree with a block model: one pass over a block of positions predicts all levels, each at one position.

This is DDTree (arXiv 2604.12989): the score of a path is the sum of its tokens' log probabilities, each predicted at
the position of its level. For a tree of B nodes each level keeps only its B best nodes, because no others can be in
the tree. If the model also corrects scores by the path above a node, this is DominoTree (arXiv 2607.08642).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tree import CandidatePool, TreeShape
from ..verifying.masks import AttentionPattern
from .cache import Entries
from .passes import Draft, FirstPass, RunPass
from .pool_growth import Root, numbered
from .step_model import Places, StepModel, likeliest
from .text import Prefix


# For each layer a bool mask `[b or 1, 1, q, s]`, false where a query must not see a key; `None` if all see all keys.
Masks = Sequence[Tensor | None]


class BlockSlots(NamedTuple):
    """Outputs of a block model's pass over a block, which predicts D levels. Slots are positions of the block."""

    hidden: Tensor  # [b, D, h] inputs of the output head
    logits: Tensor  # [b, D, d] fp32
    first: Tensor | None = None  # [b, h] output at the root's (first) slot; `None` if `hidden` begins with this output


class Branching(NamedTuple):
    """Candidate tokens for each of D levels, and a function that scores them below each parent.

    `scores(level, chosen, state)` is called for each level in turn, from 0. It returns fp32 log probabilities
    `[b, 1 or w, m]` of the level's m candidates below each of w parents (-inf if a parent cannot have such a child),
    and the next call's `state`. `chosen` `[b, w]` holds each parent's index in the level above, flattened from
    (parent, candidate); `None` if the root is the parent. `state` is `None` in the first call.
    """

    candidates: Tensor  # [b, D, m] target ids
    scores: Callable[[int, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


class BlockModel(StepModel):
    """A draft model for one target that predicts a block of tokens at once. Its cache lacks only the newest token."""

    block_levels: int  # maximum number of tokens that a block drafts
    most_children: int  # maximum number of children of a node
    patterns: Sequence[AttentionPattern]  # for each layer, which keys a position of the block attends to

    @property
    def most_levels(self) -> int:
        return self.block_levels

    @abstractmethod
    def width(self, levels: int) -> int:
        """Return how many positions a block must have, the root's included, to draft `levels` tokens."""

    @abstractmethod
    def fill(
        self, newest: Tensor, root: Tensor, levels: int, places: Places, entries: Entries, masks: Masks
    ) -> BlockSlots:
        """Run one pass over a block, which predicts `levels` tokens after the newest tokens `root` `[b]`.

        `newest` `[b, 1, h]` is the output of `run` at the newest position in the cache. `places` are the results of
        `self.places` for the block's positions. `entries` hold the text's keys and values, and store the block's;
        `masks` say which of all these keys each position of the block attends to.
        """

    def branching(self, slots: BlockSlots, root: Tensor, ranks: Tensor) -> Branching:
        """Return each level's candidates, and the function that scores them, for drafts below tokens `root` `[b]`.

        `slots` come from `fill`. By default each level has its k likeliest tokens as candidates, whose scores do
        not depend on the parent. `ranks` `[k]` is added to their scores, best first: 0, or -inf to drop a candidate.
        """
        scores, best = likeliest(slots.logits, ranks.shape[0])  # [b, D, k]
        scores = (scores + ranks)[:, :, None]
        return Branching(self.target_ids(best), lambda level, chosen, state: (scores[:, level], state))

    def oldest_seen(self, length: int) -> int:
        """Return the oldest position to keep in the cache: no block after `length` tokens attends to older ones."""
        if self.sliding_window is None:
            return 0
        stride = max(self.sliding_window // 16, 1)
        return max((length + 1 - self.sliding_window) // stride, 0) * stride


class BlockPaths(NamedTuple):
    """The best n nodes of each of D levels below the root."""

    tokens: Tensor  # [b, D, n]
    origins: Tensor  # [b, D, n] index of each node's parent in the level above
    scores: Tensor  # [b, D, n] path scores, the best first; -inf for padding at the end of a level

    def pool(self, shape: TreeShape) -> CandidatePool:
        """Return a pool with the best nodes of each level, as many as `level_sizes(shape)` says."""
        sizes, (tokens, origins, scores) = level_sizes(shape), self
        starts = [-1, *accumulate(sizes[:-1], initial=0)][: len(sizes)]
        parts = [[part[:, level, :size] for level, size in enumerate(sizes)] for part in (tokens, origins, scores)]
        parents = torch._foreach_add(parts[1], starts)
        tokens, hung, scores = (torch.cat(part, dim=1) for part in (parts[0], parents, parts[2]))
        return CandidatePool(tokens, hung, scores, numbered(sizes))


def best_paths(branching: Branching, above: Tensor, levels: int) -> BlockPaths:
    """Find in each of `levels` levels the n nodes with the best path scores. `above` `[b, n]` comes from `bounds`."""
    candidates, follow = branching
    chosen, state, best, scores = None, None, [], []
    for level in range(levels):
        found, state = follow(level, chosen, state)
        above, chosen = (above[..., None] + found).flatten(1).topk(above.shape[1], dim=-1)
        best.append(chosen)
        scores.append(above)
    places, count = torch.stack(best, dim=1), candidates.shape[-1]
    tokens = candidates.gather(2, places.remainder(count))
    return BlockPaths(tokens, places.div(count, rounding_mode="floor"), torch.stack(scores, dim=1))


def level_sizes(shape: TreeShape) -> list[int]:
    """Return how many nodes each level keeps: all `top_k**level` possible ones, but at most `total_tokens - 1`."""
    most = shape.total_tokens - 1
    return [min(most, shape.top_k**level) for level in range(1, shape.depth + 1)]


def bounds(shape: TreeShape, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the argument `above` `[rows, n]` of `best_paths`, and zeros `[k]` for `ranks` of `BlockModel.branching`.

    Their sizes determine the size of the draft: n nodes per level, k children per node. `above` holds the root's path
    score, 0, followed by -inf.
    """
    above = torch.full((rows, shape.total_tokens - 1), -torch.inf, device=device)
    above[:, 0].fill_(0.0)
    return above, torch.zeros(shape.top_k, device=device)


class BlockPass(FirstPass[BlockPaths]):
    """Runs a block model over the newest tokens, then over a block of positions, and finds the block's best paths."""

    sizes = (*FirstPass.sizes, "bn", "k")

    def __init__(self, model: BlockModel) -> None:
        super().__init__(model)
        self._block_model = model

    @property
    def name(self) -> str:
        return f"the text and a block of {self._block_model.block_levels} levels"

    def edges(self, shape: TreeShape, rows: int, fewest: int = 0) -> list[Tensor]:
        parts = [*bounds(shape, rows, self.model.device)]
        if not fewest:
            return parts
        return [F.pad(part, (0, max(fewest - part.shape[-1], 0)), value=-torch.inf) for part in parts]

    def ahead(self, shape: TreeShape | None) -> int:
        return self._block_model.width(self._block_model.block_levels if shape is None else shape.depth)

    def below(self, root: Root, text: Prefix, shape: TreeShape | None, *edges: Tensor) -> BlockPaths:
        model, count, (above, ranks) = self._block_model, self.ahead(shape), edges
        levels = model.block_levels if shape is None else shape.depth
        masks = {pattern: _mask(text, count, pattern) for pattern in dict.fromkeys(model.patterns)}
        entries = text.cache.attend(-count, text.length)
        by_layer = [masks[pattern] for pattern in model.patterns]
        slots = model.fill(root.output, root.tokens, levels, text.ahead.places, entries, by_layer)
        return best_paths(model.branching(slots, root.tokens, ranks), above, levels)


def _mask(text: Prefix, count: int, pattern: AttentionPattern) -> Tensor | None:
    """Return a bool mask `[b or 1, 1, count, count + length]` for the `count` positions of a block: true where a
    position attends to a key, first the block's keys, then those of the text. `None` if all are true.
    """
    length, seen, ends, device = text.length, text.seen, text.ends, text.cache.device
    is_cut = pattern.window is not None and (seen is not None or pattern.cuts(length + count))
    if seen is None and not pattern.is_causal and not is_cut:
        return None
    block = torch.ones(1, count, count, dtype=torch.bool, device=device)
    block = block.tril() if pattern.is_causal else block  # no window cuts it: a block is shorter than any window
    seen = torch.ones(1, 1, length, dtype=torch.bool, device=device) if seen is None else seen[:, None]
    if is_cut:
        own = torch.arange(count, device=device) + (length if ends is None else ends)  # [(b or 1,) count]
        seen = pattern.mask(own[..., None], torch.arange(length, device=device), seen)
    return torch.cat([block.expand(seen.shape[0], -1, -1), seen.expand(-1, count, -1)], dim=-1)[:, None]


class BlockDraft(Draft[BlockPaths]):
    """Drafts all levels in one pass over a block, and therefore ignores `DraftRequest.goes_on`."""

    def __init__(self, model: BlockModel, shape: TreeShape) -> None:
        most = max(shape.total_tokens - 1, 1)
        top_k = min(shape.top_k, most, model.most_children)
        self.model, self.first = model, BlockPass(model)
        self.shape = TreeShape(most + 1, min(shape.depth, model.block_levels), top_k)
        self.ahead, self.tree_room = self.first.ahead(self.shape), self.first.ahead(None) + 1
        self.level_sizes = level_sizes(self.shape)

    def pool(self, root: Root, grown: BlockPaths, text: Prefix, run: RunPass) -> CandidatePool:
        return grown.pool(self.shape)
