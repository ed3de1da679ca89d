"""A model that fills a block of slots in one pass, the likeliest paths through it, and a whole draft as one function.

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
from .cache import DraftCache
from .levels import LEAST_TOKENS, DraftFunction, NewestPairs, ReadText, filled_up, numbered, read_pairs
from .step_model import Entries, Places, StepModel


class BlockSlots(NamedTuple):
    """What a pass puts out at the slots that predict the next D tokens.

    Attributes:
        hidden: `[b, D, h]` the outputs that an output head multiplies.
        logits: `[b, D, d]` fp32.
        first: `[b, h]` the output at the root where another slot predicts the first token; `None` where it does.
    """

    hidden: Tensor
    logits: Tensor
    first: Tensor | None = None


class Branching(NamedTuple):
    """What may follow a node: of each slot the same m candidates, whatever path leads there.

    Attributes:
        candidates: `[b, D, m]` target ids.
        scores: (a level, from 0 on; which of all children of the level before its nodes are, `[b, w]`, or `None` for
            the root; what a correction knows of the paths to their parents) -> fp32 log probabilities of the
            candidates below each node, `[b, 1 or w, m]`, -inf for what is no child; what it knows of the nodes.
    """

    candidates: Tensor
    scores: Callable[[int, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


class BlockModel(StepModel):
    """A source of blocks as it drafts for one target.

    What it keeps of a text are keys and values of the positions whose features are known. The root comes after them.

    Attributes:
        block_levels: tokens that a block drafts at most.
        most_children: that a node can have.
        windows: of each layer, how many positions a slot sees, its own included; `None` for all.
        causal: of each layer, whether a slot sees no later one.
    """

    block_levels: int
    most_children: int
    windows: Sequence[int | None]
    causal: Sequence[bool]

    @property
    def most_levels(self) -> int:
        return self.block_levels

    @abstractmethod
    def width(self, levels: int) -> int:
        """Slots of a pass that drafts so many tokens, the root's included."""

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
        """One pass over a block.

        Args:
            newest: `[b, 1, h]` what `run` gave of the newest tokens.
            root: `[b]` these.
            levels: tokens to predict.
            places: of the block's slots.
            entries: of the text, and room for the block's.
            masks: of each layer, `[b or 1, 1, q, s]` bool over the entries; `None` where each slot sees all.
        """

    def branching(self, slots: BlockSlots, root: Tensor, ranks: Tensor) -> Branching:
        """What grows a tree from a block below the root `[b]`; what its levels share is done once. Here each slot is
        guessed apart, whatever the path to it.

        `ranks` `[k]` is added to the scores of a node's k likeliest children, which are all that it has.
        """
        scores, best = slots.logits.log_softmax(-1).topk(ranks.shape[0], dim=-1)  # [b, D, k]
        scores = (scores + ranks)[:, :, None]
        return Branching(self.target_ids(best), lambda level, chosen, state: (scores[:, level], state))

    def oldest_seen(self, length: int) -> int:
        """As `StepModel.oldest_seen`, but no position that a slot sees is forgotten."""
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
        """The nodes of a shape's levels."""
        sizes, (tokens, origins, scores) = level_sizes(shape), self
        starts = [-1, *accumulate(sizes[:-1], initial=0)][: len(sizes)]
        parts = [[part[:, level, :size] for level, size in enumerate(sizes)] for part in (tokens, origins, scores)]
        parents = torch._foreach_add(parts[1], starts)
        tokens, hung, scores = (torch.cat(part, dim=1) for part in (parts[0], parents, parts[2]))
        return CandidatePool(tokens, hung, scores, numbered(sizes))


def best_paths(branching: Branching, above: Tensor, levels: int) -> BlockPaths:
    """As many nodes of each level as there are places in `above` `[b, n]`, see `bounds`."""
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
    """Nodes of each level: as many as the tree may have, unless there are fewer."""
    most = shape.total_tokens - 1
    return [min(most, shape.top_k**level) for level in range(1, shape.depth + 1)]


def bounds(shape: TreeShape, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a tree begins with: scores `[rows, n]` of a level of n places that is a root alone; and what is added to
    those of a node's k likeliest children, `[k]`.
    """
    above = torch.full((rows, shape.total_tokens - 1), -torch.inf, device=device)
    above[:, 0].fill_(0.0)
    return above, torch.zeros(shape.top_k, device=device)


def draft_block(
    model: BlockModel, newest: Tensor, root: Tensor, levels: int, text: ReadText, above: Tensor, ranks: Tensor
) -> BlockPaths:
    """One pass over a block of so many levels below the root `[b]`, and the best paths through it; see `bounds`,
    `BlockModel.fill` and `BlockModel.branching`.
    """
    count, kinds = model.width(levels), list(zip(model.causal, model.windows, strict=True))
    masks = {kind: _mask(text, count, *kind, root.device) for kind in dict.fromkeys(kinds)}
    entries = text.cache.attend_from(-count, None, end=text.length)
    slots = model.fill(newest, root, levels, text.places, entries, [masks[kind] for kind in kinds])
    return best_paths(model.branching(slots, root, ranks), above, levels)


def _mask(text: ReadText, count: int, is_causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """What the slots of a block see: `[b or 1, 1, count, count + length]`, the block first."""
    _, length, _, seen, ends = text
    is_cut = window is not None and (seen is not None or length + count > window)
    if seen is None and not is_causal and not is_cut:
        return None
    block = torch.ones(1, count, count, dtype=torch.bool, device=device)
    block = block.tril() if is_causal else block
    seen = torch.ones(1, 1, length, dtype=torch.bool, device=device) if seen is None else seen[:, None]
    if is_cut:
        assert window is not None
        own = torch.arange(count, device=device) + (length if ends is None else ends)  # [(b or 1,) count]
        seen = seen & (own[..., None] - torch.arange(length, device=device) < window)
    return torch.cat([block.expand(seen.shape[0], -1, -1), seen.expand(-1, count, -1)], dim=-1)[:, None]


class BlockInputs(NamedTuple):
    """What a `BlockPass` reads: newest pairs, of which as many slots are shown as hold the text, and `bounds`."""

    pairs: NewestPairs
    above: Tensor
    ranks: Tensor

    @property
    def tokens(self) -> Tensor:
        return self.pairs.tokens

    def filled_up(self) -> list[Tensor]:
        """With the newest pair repeated, and places of nodes that are none, where there are too few."""
        above, ranks = (F.pad(part, (0, max(LEAST_TOKENS - part.shape[-1], 0)), value=-torch.inf) for part in self[1:])
        return [*filled_up(self.pairs[:4]), self.pairs.shown, above, ranks]

    def example(self) -> list[Tensor]:
        """Of sizes that all differ: equal ones would be compiled as always equal."""
        features, tokens, slots, positions, shown = self.pairs
        rows, count, length, shape = min(len(tokens), 2), 3, 11, TreeShape(6, 1, 4)
        return [
            features[:1, :1].expand(rows, count, -1),
            tokens[:1, :1].expand(rows, count),
            torch.arange(count, device=slots.device).expand(rows, -1),
            positions[:1, :1].expand(rows, count),
            shown.new_ones(rows, length),
            *bounds(shape, rows, slots.device),
        ]


class BlockPass:
    """Reads the newest pairs and fills a block of so many levels below them, as a function of tensors; `tree_room` is
    that of the cache.
    """

    dynamic = ((1,), (1,), (1,), (1,), (1,), (1,), (0,))  # as of `PassFunction`

    def __init__(self, model: BlockModel, tree_room: int, *, levels: int) -> None:
        self._model, self._tree_room, self._levels = model, tree_room, levels

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, BlockPaths]:
        """Run it over `BlockInputs` and the buffers of a cache, which are written.

        Returns:
            The fused features `[b, 1, h]` of the newest pair, and the best paths through the block.
        """
        pairs, (above, ranks), buffers = NewestPairs(*tensors[:5]), tensors[5:7], tensors[7:]
        model, levels, cache = self._model, self._levels, DraftCache(buffers, self._tree_room)
        newest, text = read_pairs(model, cache, pairs, pairs.shown.shape[1], model.width(levels))
        return newest, draft_block(model, newest, pairs.tokens[:, -1], levels, text, above, ranks)

    @staticmethod
    def scores(outputs: tuple[Tensor, BlockPaths]) -> Tensor:
        """Those of the paths that a call returns."""
        return outputs[1].scores.nan_to_num(neginf=0.0)


class BlockFunction(DraftFunction):
    """As `DraftFunction`, of a block."""

    _model: BlockModel

    def _draft(self, pairs: NewestPairs, cache: DraftCache) -> tuple[Tensor, CandidatePool]:
        draft, shown = BlockPass(self._model, cache.tree_room, levels=self._shape.depth), pairs.shown
        edges = bounds(self._shape, len(pairs.tokens), shown.device)
        newest, paths = draft(*pairs[:4], shown.expand(-1, cache.capacity), *edges, *cache.buffers)
        return newest, paths.pool(self._shape)

    @property
    def level_sizes(self) -> list[int]:
        return level_sizes(self._shape)
