"""A pool that grows level by level: which nodes get children, and what these see.

`grow_pool` knows no drafter; `sprout` and `branch` make its levels from a model's outputs.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..tree import CandidatePool
from .step_model import StepModel


class Root(NamedTuple):
    """A model's results for the newest tokens, below which it drafts.

    Attributes:
        tokens: `[b]`.
        output: `[b, 1, h]` of depth 0.
        hidden: `[b, 1, h]` what depth 0 paired them with; `None` where it reads no hidden states.
        carried: `[b, 1, h]` of each depth, what the next one pairs the next token with; empty for a single depth.
    """

    tokens: Tensor
    output: Tensor
    hidden: Tensor | None = None
    carried: tuple[Tensor, ...] = ()

    def of_rows(self, rows: Tensor) -> "Root":
        """The root of some rows."""
        tokens, output, *carried = (part.index_select(0, rows) for part in (*self[:2], *self.carried))
        return Root(tokens, output, None if self.hidden is None else self.hidden.index_select(0, rows), tuple(carried))


class Frontier(NamedTuple):
    """The nodes of one level that get children next.

    Attributes:
        tokens: `[b, w]`.
        scores: `[b, w]` path scores, as in the pool.
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
        scores: `[b, w, k]` path scores, as in the pool.
        best: `[b, k]` which of the `w * k` children get children next; `None` where none or all do.
        frontier: the children that get children next; `None` where none do.
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
    """Join the `first` level and the levels that `run` drafts after it, up to `depth` in all.

    `goes_on` decides whether a level gets children, by the levels drafted and the scores `[b, w]` of its best nodes.

    Source: EAGLE-2 (arXiv 2406.16858) section 4.1: the best nodes of a level, by path probability, get children; all
    children are candidates.
    """
    levels, frontier = [first], first.frontier
    while frontier is not None and len(levels) < depth and (goes_on is None or goes_on(len(levels), frontier.scores)):
        levels.append(run(frontier, len(levels), len(levels) + 1 == depth))
        frontier = levels[-1].frontier
    return _joined(levels)


def sprout(model: StepModel, root: Root, itself: Tensor, is_last: bool) -> Growth:
    """Draft the first level: k children of the root, which all get children. `itself` `[k, k]` is as in `branch`."""
    top_k = itself.shape[1]
    tokens, scores = model.children(root.output, top_k)  # [b, 1, k] each
    if is_last:
        return Growth(tokens, scores, None, None)
    hidden = root.carried[0] if root.carried else model.feedback(root.output, root.hidden)
    hidden = None if hidden is None else hidden.expand(-1, top_k, -1)
    return Growth(
        tokens, scores, None, Frontier(tokens[:, 0], scores[:, 0], hidden, itself.expand(len(tokens), -1, -1))
    )


def branch(
    model: StepModel,
    frontier: Frontier,
    output: Tensor,
    hidden: Tensor | None,
    itself: Tensor,
    is_last: bool,
    depth: int = 0,
) -> Growth:
    """Draft the children of a frontier, and choose which get children.

    Args:
        model: drafts.
        frontier: w nodes.
        output: `[b, w, h]` of `depth` at these nodes.
        hidden: `[b, w, h]` what their children are paired with.
        itself: `[b or 1, k, k]` bool, what each of the k nodes of the next level sees of that level.
        is_last: whether no child gets children.
        depth: index of the pass that gave the output.
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
    return CandidatePool(tokens, torch.cat(hung, dim=1).flatten(1), scores, numbered(sizes))


def numbered(sizes: list[int]) -> Tensor:
    """The level of each node of a pool, 1 for the first, from the sizes of its levels."""
    return torch.tensor([level for level, size in enumerate(sizes, start=1) for _ in range(size)])
