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
        indices: `[b, w]` in the pool.
        tokens: `[b, w]`.
        scores: `[b, w]` as the pool has them.
        hidden: `[b, w, h]` what stands in for a feature: the parent's output.
        visible: `[b, w, e + w]` bool; ancestors among the entries drafted before, and of this level the node itself.
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
    tokens, scores = (part[:, 0] for part in _children(bound, newest, top_k))  # [b, k]
    pool = [(tokens, torch.full_like(tokens, -1), scores)]
    if depth > 1:
        frontier = _first(bound.head.feedback(newest), tokens, scores)
    for level in range(1, depth):
        if not goes_on(level, frontier.scores):
            break
        output = run(frontier, level)
        tokens, scores = _children(bound, output, top_k)  # [b, w, k]
        scores = scores + frontier.scores[..., None]
        parents = frontier.indices[..., None].expand_as(tokens)
        pool.append((tokens.flatten(1), parents.flatten(1), scores.flatten(1)))
        if level + 1 < depth:
            first = sum(part[0].shape[1] for part in pool[:-1])
            frontier = _next(frontier, bound.head.feedback(output), tokens, scores, first)
    levels = [torch.full((part[0].shape[1],), level) for level, part in enumerate(pool, start=1)]
    joined = [torch.cat(parts, dim=1) for parts in zip(*pool, strict=True)]
    return CandidatePool(joined[0], joined[1], joined[2], torch.cat(levels))


def _children(bound: BoundHead, output: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` likeliest tokens after each output: target ids and fp32 log probabilities, `[b, w, k]`."""
    log_probs = bound.logits(output).log_softmax(dim=-1)
    scores, draft_ids = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)
    return bound.target_ids(draft_ids), scores


def _first(hidden: Tensor, tokens: Tensor, scores: Tensor) -> Frontier:
    """All children `[b, k]` of the root, whose output is `hidden` `[b, 1, h]`."""
    width = tokens.shape[1]
    indices = torch.arange(width, device=tokens.device).expand_as(tokens)
    return Frontier(indices, tokens, scores, hidden.expand(-1, width, -1), _itself(tokens))


def _next(frontier: Frontier, hidden: Tensor, tokens: Tensor, scores: Tensor, first: int) -> Frontier:
    """The best children `[b, w, k]` of a frontier, wherever they hang; `first` is their first pool index."""
    top_k = tokens.shape[-1]
    scores, best = scores.flatten(1).topk(top_k, dim=-1)
    origin = best.div(top_k, rounding_mode="floor")[..., None]  # [b, k, 1] position of the parent in the frontier
    tokens = tokens.flatten(1).gather(1, best)
    hidden = hidden.gather(1, origin.expand(-1, -1, hidden.shape[-1]))
    seen = frontier.visible.gather(1, origin.expand(-1, -1, frontier.visible.shape[-1]))
    return Frontier(first + best, tokens, scores, hidden, torch.cat([seen, _itself(tokens)], dim=-1))


def _itself(tokens: Tensor) -> Tensor:
    """`[b, w, w]` bool: each node of a level sees, of the level, itself."""
    return torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
