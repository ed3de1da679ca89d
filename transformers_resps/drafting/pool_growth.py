"""A pool that grows level by level: which nodes get children, and what these see.

`grow_pool` knows no drafter; `sprout` and `branch` make its levels from what a model puts out.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..tree import CandidatePool
from .step_model import StepModel


class Frontier(NamedTuple):
    """The nodes of one level that get children next.

    Attributes:
        tokens: `[b, w]`.
        scores: `[b, w]` as the pool has them.
        hidden: `[b, w, h]` what they are paired with: the parent's output; `None` where the model reads none.
        visible: `[b, w, w + e]` bool: which drafted entries a node sees; of its own level itself, then its ancestors
            in the earlier levels, the newest level first.
    """

    tokens: Tensor
    scores: Tensor
    hidden: Tensor | None
    visible: Tensor


class Growth(NamedTuple):
    """One more level.

    Attributes:
        tokens: `[b, w, k]` the children of each node of a frontier.
        scores: `[b, w, k]` as the pool has them.
        best: `[b, k]` which of the `w * k` children get children next; `None` where none or all do.
        frontier: these; `None` where none do.
    """

    tokens: Tensor
    scores: Tensor
    best: Tensor | None
    frontier: Frontier | None


# (frontier, its level, whether its children are the last) -> one more level
RunLevel = Callable[[Frontier, int, bool], Growth]


def grow_pool(
    first: Growth,
    depth: int,
    run: RunLevel,
    goes_on: Callable[[int, Tensor], bool] | None = None,
) -> CandidatePool:
    """The `first` level and those that `run` drafts after it, up to `depth` in all.

    `goes_on` decides whether a level gets children, by the levels drafted and the scores `[b, w]` of its best nodes.

    Source: EAGLE-2 (arXiv 2406.16858) section 4.1: the best nodes of a level, by path probability, get children; all
    children are candidates.
    """
    levels, frontier = [first], first.frontier
    while frontier is not None and len(levels) < depth and (goes_on is None or goes_on(len(levels), frontier.scores)):
        levels.append(run(frontier, len(levels), len(levels) + 1 == depth))
        frontier = levels[-1].frontier
    return _joined(levels)


def sprout(model: StepModel, newest: Tensor, top_k: int, is_last: bool, carried: Tensor | None = None) -> Growth:
    """The first level, of `top_k` nodes, all of which get children.

    `newest` `[b, 1, h]` is the model's output at the root, and `carried` what it pairs these with instead of feedback.
    """
    children = model.children(newest, top_k)  # [b, 1, k] each
    return first_level(*children, None if is_last else _paired(model, newest, carried), is_last)


def first_level(tokens: Tensor, scores: Tensor, hidden: Tensor | None, is_last: bool) -> Growth:
    """Of the root's children `[b, 1, k]`, which are paired with `hidden` `[b, 1, h]`."""
    if is_last:
        return Growth(tokens, scores, None, None)
    rows, _, width = tokens.shape
    hidden = None if hidden is None else hidden.expand(-1, width, -1)
    itself = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(rows, -1, -1)
    return Growth(tokens, scores, None, Frontier(tokens[:, 0], scores[:, 0], hidden, itself))


def branch(
    model: StepModel,
    frontier: Frontier,
    output: Tensor,
    is_last: bool,
    *,
    carried: Tensor | None = None,
    depth: int = 0,
    itself: Tensor | None = None,
) -> Growth:
    """The children of a frontier, by the output `[b, w, h]` of a depth over it, and which of them get children.

    `carried` is what these are paired with instead of feedback. `itself` `[b, k, k]` is what the next level sees of
    its own nodes; without it that is as wide as the frontier.
    """
    if itself is None:
        itself = frontier.visible[..., : frontier.tokens.shape[1]]  # every level begins with it
    tokens, scores = model.children(output, itself.shape[2], depth)
    scores = scores + frontier.scores[..., None]
    if is_last:
        return Growth(tokens, scores, None, None)
    return Growth(tokens, scores, *_next(frontier, _paired(model, output, carried), tokens, scores, itself))


def _paired(model: StepModel, output: Tensor, carried: Tensor | None) -> Tensor | None:
    """What children are paired with; `None` where the model reads no hidden states."""
    return model.feedback(output) if carried is None and model.reads_features else carried


def _joined(levels: list[Growth]) -> CandidatePool:
    """The tokens and scores of all levels, one after the other, and which nodes they hang from."""
    first = levels[0].tokens
    order = torch.arange(-1, first.shape[-1], device=first.device)  # the root, and the nodes of the first level
    sizes = [level.tokens.shape[1:].numel() for level in levels]
    parents = [order[:1, None], order[1:, None]]
    bests = [level.best for level in levels[1:-1] if level.best is not None]  # of the last none got children
    if bests:
        starts = list(accumulate(sizes))[: len(bests)]  # where their levels begin
        parents += [own[..., None] for own in torch._foreach_add(bests, starts)]
    hung = [own.expand_as(level.tokens) for own, level in zip(parents, levels, strict=False)]
    tokens = torch.cat([level.tokens for level in levels], dim=1).flatten(1)
    scores = torch.cat([level.scores for level in levels], dim=1).flatten(1)
    level_of = [number for number, size in enumerate(sizes, start=1) for _ in range(size)]
    return CandidatePool(tokens, torch.cat(hung, dim=1).flatten(1), scores, torch.tensor(level_of))


def _next(
    frontier: Frontier, hidden: Tensor | None, tokens: Tensor, scores: Tensor, itself: Tensor
) -> tuple[Tensor, Frontier]:
    """The best children `[b, w, k]` of a frontier, wherever they hang: which they are, and the next frontier."""
    top_k = tokens.shape[-1]
    scores, best = scores.flatten(1).topk(top_k, dim=-1)
    origin = best.div(top_k, rounding_mode="floor")[..., None]  # [b, k, 1] position of the parent in the frontier
    tokens = tokens.flatten(1).gather(1, best)
    if hidden is not None:
        hidden = hidden.gather(1, origin.expand(-1, -1, hidden.shape[-1]))
    seen = frontier.visible.gather(1, origin.expand(-1, -1, frontier.visible.shape[-1]))
    return best, Frontier(tokens, scores, hidden, torch.cat([itself, seen], dim=-1))
