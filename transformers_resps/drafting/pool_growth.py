"""A pool grown level by level: which nodes get children, and what these see.

The caller runs a level through the head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..head import BoundHead
from ..tree import CandidatePool


@dataclass(frozen=True, slots=True)
class Frontier:
    """The nodes of one level that get children next.

    Attributes:
        indices: `[b or 1, w]` in the pool.
        tokens: `[b, w]`.
        scores: `[b, w]` as the pool has them.
        hidden: `[b, w, h]` what stands in for a feature: the parent's output.
        visible: `[b, w, e + w]` bool; ancestors among the entries drafted before, the newest level first, and before
            these, of its own level, the node itself.
    """

    indices: Tensor
    tokens: Tensor
    scores: Tensor
    hidden: Tensor
    visible: Tensor


def grow_pool(
    bound: BoundHead,
    newest: Tensor,
    top_k: int,
    depth: int,
    run: Callable[[Frontier, int], Tensor],
    goes_on: Callable[[int, Tensor], bool] = lambda depth, scores: True,
) -> CandidatePool:
    """Up to `depth` levels, at least one, of `top_k` children per node, or as many as the head can propose.

    Args:
        bound: the head, with its target's embedding and output rows.
        newest: `[b, 1, h]` its output at the last pair before the root.
        top_k: also nodes of a level that get children.
        depth: most levels.
        run: (frontier, its level) -> the head's output `[b, w, h]` over it.
        goes_on: (levels drafted, scores `[b, w]` of the nodes that would get children) -> whether they do.

    Source: EAGLE-2 (arXiv 2406.16858) section 4.1: the best `top_k` nodes of a level, by path probability, get
    children; all children are candidates.
    """
    tokens, scores = _children(bound, newest, top_k)  # [b, 1, k]
    pool = [(tokens, torch.full_like(tokens[:1, :, :1], -1), scores)]
    if depth > 1:
        itself = torch.eye(tokens.shape[-1], dtype=torch.bool, device=tokens.device)
        frontier = _first(bound.head.feedback(newest), tokens[:, 0], scores[:, 0], itself)
    for level in range(1, depth):
        if not goes_on(level, frontier.scores):
            break
        output = run(frontier, level)
        tokens, scores = _children(bound, output, top_k)  # [b, w, k]
        scores = scores + frontier.scores[..., None]
        pool.append((tokens, frontier.indices[..., None], scores))
        if level + 1 < depth:
            first = sum(part[0].shape[1:].numel() for part in pool[:-1])
            frontier = _next(frontier, bound.head.feedback(output), tokens, scores, first, itself)
    return _joined(pool)


def _joined(pool: list[tuple[Tensor, Tensor, Tensor]]) -> CandidatePool:
    """The levels' tokens, parents and scores, each expandable to `[b, w, k]`, one after the other."""
    rows = [(tokens, parents.expand_as(tokens), scores) for tokens, parents, scores in pool]
    tokens, parents, scores = (torch.cat(parts, dim=1).flatten(1) for parts in zip(*rows, strict=True))
    levels = [torch.full(part[0].shape[1:], level).flatten() for level, part in enumerate(pool, start=1)]
    return CandidatePool(tokens, parents, scores, torch.cat(levels))


def _children(bound: BoundHead, output: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` likeliest tokens after each output: target ids and fp32 log probabilities, `[b, w, k]`."""
    log_probs = bound.logits(output).log_softmax(dim=-1)
    scores, draft_ids = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)
    return bound.target_ids(draft_ids), scores


def _first(hidden: Tensor, tokens: Tensor, scores: Tensor, itself: Tensor) -> Frontier:
    """All children `[b, k]` of the root, whose output is `hidden` `[b, 1, h]`."""
    rows, width = tokens.shape
    indices = torch.arange(width, device=tokens.device)[None]
    return Frontier(indices, tokens, scores, hidden.expand(-1, width, -1), itself.expand(rows, -1, -1))


def _next(frontier: Frontier, hidden: Tensor, tokens: Tensor, scores: Tensor, first: int, itself: Tensor) -> Frontier:
    """The best children `[b, w, k]` of a frontier, wherever they hang; `first` is their first pool index."""
    rows, top_k = len(tokens), tokens.shape[-1]
    scores, best = scores.flatten(1).topk(top_k, dim=-1)
    origin = best.div(top_k, rounding_mode="floor")[..., None]  # [b, k, 1] position of the parent in the frontier
    tokens = tokens.flatten(1).gather(1, best)
    hidden = hidden.gather(1, origin.expand(-1, -1, hidden.shape[-1]))
    seen = frontier.visible.gather(1, origin.expand(-1, -1, frontier.visible.shape[-1]))
    return Frontier(first + best, tokens, scores, hidden, torch.cat([itself.expand(rows, -1, -1), seen], dim=-1))
