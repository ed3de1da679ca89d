"""Grow a candidate pool level by level: choose which nodes get children, and which nodes each node attends to.

`grow_pool` works for any drafter. `sprout` and `branch` make the pool's levels from the outputs of a draft model.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..tree import CandidatePool
from .drafter import GoesOn
from .step_model import StepModel


class Root(NamedTuple):
    """A draft model's results for the newest token of each row, below which it drafts a tree."""

    tokens: Tensor  # [b] the newest tokens
    output: Tensor  # [b, 1, h] output of depth 0
    hidden: Tensor | None = None  # [b, 1, h] hidden states paired with the tokens; `None` if the model reads none
    carried: tuple[Tensor, ...] = ()  # for each depth, its state [b, 1, h] for the next depth; empty for one depth

    def of_rows(self, rows: Tensor) -> "Root":
        tokens, output, *carried = (part.index_select(0, rows) for part in (*self[:2], *self.carried))
        return Root(tokens, output, None if self.hidden is None else self.hidden.index_select(0, rows), tuple(carried))


class Frontier(NamedTuple):
    """The nodes of one level that get children next."""

    tokens: Tensor  # [b, w]
    scores: Tensor  # [b, w] path scores, as in the pool
    # [b, w, h] hidden states from the nodes' parents, to pair with the nodes; `None` if the model reads none
    hidden: Tensor | None
    # [b, w, w + e] bool, true where a node attends to a drafted entry: to itself among the w entries of its level, and
    # to its ancestors among the e entries of earlier levels, the newest level first
    visible: Tensor


class Growth(NamedTuple):
    """One more level of a pool: the children of a frontier, and the frontier of the next level."""

    tokens: Tensor  # [b, w, k] the children of each node of a frontier
    scores: Tensor  # [b, w, k] path scores, as in the pool
    best: Tensor | None  # [b, k] which of the w * k children get children next; `None` if none or all do
    frontier: Frontier | None  # the children that get children next; `None` if none do


# (frontier, its level, whether the new level is the last one) -> the new level
RunLevel = Callable[[Frontier, int, bool], Growth]


def grow_pool(first: Growth, depth: int, run: RunLevel, goes_on: GoesOn | None = None) -> CandidatePool:
    """Draft levels below the level `first` by calls of `run`, and return up to `depth` levels as a pool.

    For `goes_on` see `DraftRequest`. As in EAGLE-2 (arXiv 2406.16858, section 4.1), the best nodes of a level, by path
    probability, get children, and all children are candidates.
    """
    levels, frontier = [first], first.frontier
    while frontier is not None and len(levels) < depth and (goes_on is None or goes_on(len(levels), frontier.scores)):
        levels.append(run(frontier, len(levels), len(levels) + 1 == depth))
        frontier = levels[-1].frontier
    return _joined(levels)


def sprout(model: StepModel, root: Root, itself: Tensor, is_last: bool) -> Growth:
    """Draft the first level: k children of the root, which all get children. For `itself` `[k, k]` see `branch`."""
    top_k = itself.shape[1]
    tokens, scores = model.children(root.output, top_k)  # [b, 1, k] each
    if is_last:
        return Growth(tokens, scores, None, None)
    hidden = root.carried[0] if root.carried else model.feedback(root.output, root.hidden)
    hidden = None if hidden is None else hidden.expand(-1, top_k, -1)
    frontier = Frontier(tokens[:, 0], scores[:, 0], hidden, itself.expand(len(tokens), -1, -1))
    return Growth(tokens, scores, None, frontier)


def branch(
    model: StepModel,
    frontier: Frontier,
    output: Tensor,
    hidden: Tensor | None,
    itself: Tensor,
    is_last: bool,
    depth: int = 0,
) -> Growth:
    """Draft k children of each of w nodes of a frontier, and choose the k best of all children to get children next.

    `output` `[b, w, h]` has the outputs of the model's depth number `depth` at these nodes, `hidden` `[b, w, h]` the
    states to pair with their children. `itself` `[b or 1, k, k]` is an identity matrix: in their level, the k chosen
    children attend only to themselves.
    """
    top_k = itself.shape[2]
    tokens, scores = model.children(output, top_k, depth)
    scores = scores + frontier.scores[..., None]
    if is_last:
        return Growth(tokens, scores, None, None)
    kept, best = scores.flatten(1).topk(top_k, dim=-1)
    origin = best.div(top_k, rounding_mode="floor")[..., None]  # [b, k, 1] position of the parent in the frontier
    if hidden is not None:
        hidden = hidden.gather(1, origin.expand(-1, -1, hidden.shape[-1]))
    seen = frontier.visible.gather(1, origin.expand(-1, -1, frontier.visible.shape[-1]))
    visible = torch.cat([itself.expand(len(seen), -1, -1), seen], dim=-1)
    return Growth(tokens, scores, best, Frontier(tokens.flatten(1).gather(1, best), kept, hidden, visible))


def _joined(levels: list[Growth]) -> CandidatePool:
    """Concatenate the levels to a pool, and compute for each node the index of its parent in the pool."""
    first = levels[0].tokens
    order = torch.arange(-1, first.shape[-1], device=first.device)  # indices of the root (-1) and the first level
    sizes = [level.tokens.shape[1:].numel() for level in levels]
    parents = [order[:1, None], order[1:, None]]
    bests = [level.best for level in levels[1:-1] if level.best is not None]  # the last level has no children
    if bests:
        starts = list(accumulate(sizes))[: len(bests)]  # index in the pool at which each of these levels begins
        parents += [own[..., None] for own in torch._foreach_add(bests, starts)]
    hung = [own.expand_as(level.tokens) for own, level in zip(parents, levels, strict=False)]
    tokens = torch.cat([level.tokens for level in levels], dim=1).flatten(1)
    scores = torch.cat([level.scores for level in levels], dim=1).flatten(1)
    return CandidatePool(tokens, torch.cat(hung, dim=1).flatten(1), scores, numbered(sizes))


def numbered(sizes: list[int]) -> Tensor:
    """Return each node's level, counted from 1, given the number of nodes in each level."""
    return torch.tensor([level for level, size in enumerate(sizes, start=1) for _ in range(size)])
