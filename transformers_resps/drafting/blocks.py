"""A model that fills a block of slots in one pass, and the draft of the likeliest paths through it.

DDTree (arXiv 2604.12989): a path scores the sum of its tokens' log probabilities, each from its own slot. No node that
ranks below the best B of its level is among the best B of all, so the best B of each level hold the tree. With
corrections along each path it is DominoTree (arXiv 2607.08642), level by level.
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
from .step_model import Places, StepModel
from .text import Prefix


class BlockSlots(NamedTuple):
    """Outputs of a pass at the slots that predict the next D tokens.

    Attributes:
        hidden: `[b, D, h]` the outputs that an output head multiplies.
        logits: `[b, D, d]` fp32.
        first: `[b, h]` the output at the root where another slot predicts the first token; `None` where it does.
    """

    hidden: Tensor
    logits: Tensor
    first: Tensor | None = None


class Branching(NamedTuple):
    """Candidates that may follow a node: each slot has the same m, whatever path leads there.

    Attributes:
        candidates: `[b, D, m]` target ids.
        scores: (a level, from 0 on; the places of its nodes among all children of the level before, `[b, w]`, `None`
            for the root; a correction's state of the paths to their parents) -> fp32 log probabilities of the
            candidates below each node, `[b, 1 or w, m]`, -inf for no child; the correction's state of the nodes.
    """

    candidates: Tensor
    scores: Callable[[int, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


class BlockModel(StepModel):
    """A source of blocks as it drafts for one target.

    Its cache has the positions whose features are known. The root comes after them.

    Attributes:
        block_levels: most tokens that a block drafts.
        most_children: most children that a node can have.
        patterns: the keys that a slot sees, in each layer.
    """

    block_levels: int
    most_children: int
    patterns: Sequence[AttentionPattern]

    @property
    def most_levels(self) -> int:
        return self.block_levels

    @abstractmethod
    def width(self, levels: int) -> int:
        """Count the slots of a pass that drafts so many tokens, the root's included."""

    @abstractmethod
    def fill(
        self,
        newest: Tensor,
        root: Tensor,
        levels: int,
        places: Places,
        entries: Entries,
        masks: Sequence[Tensor | None],
    ) -> BlockSlots:
        """Run one pass over a block.

        Args:
            newest: `[b, 1, h]` output of `run` at the newest tokens.
            root: `[b]` the newest tokens.
            levels: tokens to predict.
            places: places of the block's slots.
            entries: the text's, and room for the block's.
            masks: for each layer, `[b or 1, 1, q, s]` bool over the entries; `None` where each slot sees all.
        """

    def branching(self, slots: BlockSlots, root: Tensor, ranks: Tensor) -> Branching:
        """Make the candidates of a tree below the root `[b]`. Here each slot is guessed apart, whatever its path.

        `ranks` `[k]` is added to the scores of a node's k likeliest children, which are its only ones.
        """
        scores, best = slots.logits.log_softmax(-1).topk(ranks.shape[0], dim=-1)  # [b, D, k]
        scores = (scores + ranks)[:, :, None]
        return Branching(self.target_ids(best), lambda level, chosen, state: (scores[:, level], state))

    def oldest_seen(self, length: int) -> int:
        """Position of the oldest token that is kept: one that a slot sees is never forgotten."""
        if self.sliding_window is None:
            return 0
        stride = max(self.sliding_window // 16, 1)
        return max((length + 1 - self.sliding_window) // stride, 0) * stride


class BlockPaths(NamedTuple):
    """The best n nodes of each level below a root.

    Attributes:
        tokens: `[b, D, n]`.
        origins: `[b, D, n]` place of the parent among those of the level before.
        scores: `[b, D, n]`, falling along each level; -inf after the last node.
    """

    tokens: Tensor
    origins: Tensor
    scores: Tensor

    def pool(self, shape: TreeShape) -> CandidatePool:
        """Make the pool of a shape's levels."""
        sizes, (tokens, origins, scores) = level_sizes(shape), self
        starts = [-1, *accumulate(sizes[:-1], initial=0)][: len(sizes)]
        parts = [[part[:, level, :size] for level, size in enumerate(sizes)] for part in (tokens, origins, scores)]
        parents = torch._foreach_add(parts[1], starts)
        tokens, hung, scores = (torch.cat(part, dim=1) for part in (parts[0], parents, parts[2]))
        return CandidatePool(tokens, hung, scores, numbered(sizes))


def best_paths(branching: Branching, above: Tensor, levels: int) -> BlockPaths:
    """Find the best n nodes of each level; `above` `[b, n]` is as in `bounds`."""
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
    """Count the nodes of each level: as many as the tree may have, unless there are fewer."""
    most = shape.total_tokens - 1
    return [min(most, shape.top_k**level) for level in range(1, shape.depth + 1)]


def bounds(shape: TreeShape, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make what a tree begins with: scores `[rows, n]` of a level of n places that is a root alone; and what is added
    to the scores of a node's k likeliest children, `[k]`.
    """
    above = torch.full((rows, shape.total_tokens - 1), -torch.inf, device=device)
    above[:, 0].fill_(0.0)
    return above, torch.zeros(shape.top_k, device=device)


class BlockPass(FirstPass[BlockPaths]):
    """Reads the newest pairs, fills a block below them, and finds the best paths through it."""

    sizes = (*FirstPass.sizes, "bn", "k")

    def __init__(self, model: BlockModel) -> None:
        super().__init__(model)
        self._block_model = model

    @property
    def name(self) -> str:
        return f"{super().name} of {self._block_model.block_levels} levels"

    def edges(self, shape: TreeShape, rows: int, fewest: int = 0) -> list[Tensor]:
        parts = bounds(shape, rows, self.model.device)
        return (
            [F.pad(part, (0, max(fewest - part.shape[-1], 0)), value=-torch.inf) for part in parts]
            if fewest
            else [*parts]
        )

    def ahead(self, shape: TreeShape | None) -> int:
        return self._block_model.width(self._levels(shape))

    def _levels(self, shape: TreeShape | None) -> int:
        return self._block_model.block_levels if shape is None else shape.depth

    def below(self, root: Root, text: Prefix, shape: TreeShape | None, *edges: Tensor) -> BlockPaths:
        model, levels, count, (above, ranks) = self._block_model, self._levels(shape), self.ahead(shape), edges
        masks = {pattern: _mask(text, count, pattern) for pattern in dict.fromkeys(model.patterns)}
        entries = text.cache.attend(-count, text.length)
        by_layer = [masks[pattern] for pattern in model.patterns]
        slots = model.fill(root.output, root.tokens, levels, text.ahead.places, entries, by_layer)
        return best_paths(model.branching(slots, root.tokens, ranks), above, levels)


def _mask(text: Prefix, count: int, pattern: AttentionPattern) -> Tensor | None:
    """Make the mask of a block's slots, `[b or 1, 1, count, count + length]`: the block, then the text."""
    length, seen, ends, device = text.length, text.seen, text.ends, text.cache.device
    is_cut = pattern.window is not None and (seen is not None or pattern.cuts(length + count))
    if seen is None and not pattern.is_causal and not is_cut:
        return None
    block = torch.ones(1, count, count, dtype=torch.bool, device=device)
    block = block.tril() if pattern.is_causal else block  # shorter than any window
    seen = torch.ones(1, 1, length, dtype=torch.bool, device=device) if seen is None else seen[:, None]
    if is_cut:
        own = torch.arange(count, device=device) + (length if ends is None else ends)  # [(b or 1,) count]
        seen = pattern.mask(own[..., None], torch.arange(length, device=device), seen)
    return torch.cat([block.expand(seen.shape[0], -1, -1), seen.expand(-1, count, -1)], dim=-1)[:, None]


class BlockDraft(Draft[BlockPaths]):
    """Drafts all levels by the pass over a block. A shape's `top_k` is the most children of a node, and a level keeps
    as many nodes as the tree may have. `goes_on` is not asked.
    """

    at_once = True

    def __init__(
        self, model: BlockModel, shape: TreeShape, goes_on: Callable[[int, Tensor], bool] | None = None
    ) -> None:
        most = max(shape.total_tokens - 1, 1)
        top_k = min(shape.top_k, most, model.most_children)
        self.model, self.first = model, BlockPass(model)
        self.shape = TreeShape(most + 1, min(shape.depth, model.block_levels), top_k)
        self.ahead, self.tree_room = self.first.ahead(self.shape), self.first.ahead(None) + 1
        self.level_sizes = level_sizes(self.shape)

    def pool(self, root: Root, grown: BlockPaths, text: Prefix, run: RunPass) -> CandidatePool:
        return grown.pool(self.shape)
