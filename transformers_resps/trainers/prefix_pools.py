"""The candidate pools of all positions of one text, drafted together.

What a head drafts depends on the prefix alone, never on earlier trees: its cache holds true features only. So the
nodes of many roots go through the head in one pass, each seeing its own prefix and its own ancestors.

Knows the head: nothing of outcomes or policies. Shapes: r roots, w nodes that get children, p pool nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..head import BoundHead, HeadCache
from ..tree import CandidatePool


_MOST_QUERIES = 256  # nodes in one pass of the head


@dataclass(slots=True)
class _Level:
    """The nodes that get children next."""

    indices: Tensor  # [r, w] in the pool
    tokens: Tensor  # [r, w]
    scores: Tensor  # [r, w]
    hidden: Tensor  # [r, w, h]
    visible: list[Tensor]  # per level drafted before and this one: [r, w, its w], which nodes are ancestors or itself


class PrefixPools:
    """Drafts from every position of a text.

    Args:
        head: with its target's embedding and output rows.
        features: `[1, s, F]` of the text's first s positions.
        tokens: `[1, s]` the token after each of them.
    """

    def __init__(self, head: BoundHead, features: Tensor, tokens: Tensor) -> None:
        self._head = head
        module = head.head
        device, count = module.device, tokens.shape[1]
        self._length = count
        self._cache = HeadCache(module.config, 1, module.dtype, device)
        self._cache.reserve(count)
        self._outputs: Tensor = module(
            module.fuse(features.to(device, module.dtype)),
            head.embed(tokens.to(device)),
            torch.arange(count, device=device)[None],
            self._cache.attend_from(0, None, is_causal=count > 1),
        )[0]  # [s, h]

    def draft(self, prefixes: Tensor, top_k: int, depth: int) -> Iterator[tuple[Tensor, CandidatePool]]:
        """Pools of `depth` levels below the roots that follow prefixes of these lengths `[n]`.

        Yields:
            Some of the prefixes, `[r]`, and their pools, which `TreeCandidateGenerator.draft` would give there.
        """
        width = min(top_k, self._head.head.config.draft_rows)
        for part in prefixes.to(self._outputs.device).split(max(1, _MOST_QUERIES // width)):
            yield part, self._draft(part, width, depth)

    def _draft(self, prefixes: Tensor, top_k: int, depth: int) -> CandidatePool:
        newest = self._outputs[prefixes - 1][:, None]  # [r, 1, h]
        tokens, scores = self._children(newest, top_k)
        pool = [(tokens[:, 0], torch.full_like(tokens[:, 0], -1), scores[:, 0])]
        own = torch.eye(top_k, dtype=torch.bool, device=tokens.device).expand(len(prefixes), -1, -1)
        indices = torch.arange(top_k, device=tokens.device).expand_as(tokens[:, 0])
        hidden = self._head.head.feedback(newest).expand(-1, top_k, -1)
        level = _Level(indices, tokens[:, 0], scores[:, 0], hidden, [own])
        for drafted in range(1, depth):
            output = self._run(level, prefixes, drafted)
            tokens, scores = self._children(output, top_k)  # [r, w, k]
            scores = scores + level.scores[..., None]
            parents = level.indices[..., None].expand_as(tokens)
            first = sum(part[0].shape[1] for part in pool)
            pool.append((tokens.flatten(1), parents.flatten(1), scores.flatten(1)))
            level = self._next(level, output, tokens, scores, first)
        levels = [torch.full((part[0].shape[1],), number) for number, part in enumerate(pool, start=1)]
        all_tokens, all_parents, all_scores = (torch.cat(parts, dim=1) for parts in zip(*pool, strict=True))
        return CandidatePool(all_tokens, all_parents, all_scores, torch.cat(levels))

    def _children(self, output: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        scores, draft_ids = self._head.logits(output).log_softmax(dim=-1).topk(top_k, dim=-1)
        return self._head.target_ids(draft_ids), scores

    def _next(self, level: _Level, output: Tensor, tokens: Tensor, scores: Tensor, first: int) -> _Level:
        top_k = tokens.shape[-1]
        scores, best = scores.flatten(1).topk(top_k, dim=-1)
        origin = best.div(top_k, rounding_mode="floor")[..., None]  # [r, k, 1]
        hidden = self._head.head.feedback(output)
        seen = [part.gather(1, origin.expand(-1, -1, part.shape[-1])) for part in level.visible]
        own = torch.eye(top_k, dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
        return _Level(
            first + best,
            tokens.flatten(1).gather(1, best),
            scores,
            hidden.gather(1, origin.expand(-1, -1, hidden.shape[-1])),
            [*seen, own],
        )

    def _run(self, level: _Level, prefixes: Tensor, drafted: int) -> Tensor:
        """One pass over a level of all roots, laid out one root behind the other in a single row: `[r, w, h]`."""
        roots, width = level.tokens.shape
        slots = torch.arange(self._length, device=prefixes.device)
        prefix = (slots < prefixes[:, None])[:, None].expand(-1, width, -1).flatten(0, 1)  # [r * w, s]
        same_root = torch.eye(roots, dtype=torch.bool, device=prefixes.device)[:, None, :, None]
        nodes = [(part[:, :, None] & same_root).flatten(2).flatten(0, 1) for part in level.visible]  # [r * w, r * w]
        start = self._length + (len(nodes) - 1) * roots * width
        self._cache.reserve(start + roots * width)
        output: Tensor = self._head.head(
            level.hidden.flatten(0, 1)[None],
            self._head.embed(level.tokens.flatten()[None]),
            (prefixes + drafted - 1).repeat_interleave(width)[None],
            self._cache.attend_from(start, torch.cat([prefix, *nodes], dim=1)[None, None]),
        )
        return output.view(roots, width, -1)
