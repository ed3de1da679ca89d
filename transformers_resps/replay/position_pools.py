"""The candidate pools of all positions of one text, drafted together.

What a head drafts depends on the prefix alone, never on earlier trees: its cache holds true features only. So the
nodes of many roots go through the head in one pass, each seeing its own prefix and its own ancestors.

Tensor shapes: r roots, w nodes that get children.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..drafting.pool_growth import Frontier, Growth, branch, grow_pool
from ..head import BoundHead, HeadCache
from ..tree import CandidatePool


_MAX_QUERIES = 256  # nodes in one pass of the head


class PositionPools:
    """Drafts from every position of a text.

    Args:
        bound: the head, with its target's embedding and output rows.
        features: `[1, s, F]` of the text's first s positions.
        tokens: `[1, s]` the token after each of them.
    """

    def __init__(self, bound: BoundHead, features: Tensor, tokens: Tensor) -> None:
        self._bound = bound
        module = bound.head
        device, count = module.device, tokens.shape[1]
        self._length = count
        self._cache = HeadCache.empty(module.config, 1, module.dtype, device)
        self._cache.reserve(count)
        self._outputs: Tensor = module(
            module.fuse(features.to(device, module.dtype)),
            bound.embed(tokens.to(device)),
            torch.arange(count, device=device)[None],
            self._cache.attend_from(0, None, is_causal=count > 1),
        )[0]  # [s, h]

    def draft(self, prefixes: Tensor, top_k: int, depth: int) -> Iterator[tuple[Tensor, CandidatePool]]:
        """Pools of `depth` levels below the roots that follow prefixes of these lengths `[n]`.

        Yields:
            Some of the prefixes, `[r]`, and their pools, which `TreeCandidateGenerator.draft` would give there.
        """
        width = min(top_k, self._bound.head.config.proposable_tokens)
        for part in prefixes.to(self._outputs.device).split(max(1, _MAX_QUERIES // width)):
            newest = self._outputs[part - 1][:, None]  # [r, 1, h]
            yield part, grow_pool(self._bound, newest, width, depth, partial(self._run, part))

    def _run(self, prefixes: Tensor, frontier: Frontier, drafted: int, is_last: bool) -> Growth:
        """One pass over a level of all roots, laid out one root after the other in a single row."""
        roots, width = frontier.tokens.shape
        slots = torch.arange(self._length, device=prefixes.device)
        prefix = (slots < prefixes[:, None])[:, None].expand(-1, width, -1).flatten(0, 1)  # [r * w, s]
        same_root = torch.eye(roots, dtype=torch.bool, device=prefixes.device)[:, None, :, None]
        levels = frontier.visible.split(width, dim=-1)[::-1]  # [r, w, w] each
        nodes = [(part[:, :, None] & same_root).flatten(2).flatten(0, 1) for part in levels]  # [r * w, r * w]
        start = self._length + (len(nodes) - 1) * roots * width
        self._cache.reserve(start + roots * width)
        output: Tensor = self._bound.head(
            frontier.hidden.flatten(0, 1)[None],
            self._bound.embed(frontier.tokens.flatten()[None]),
            (prefixes + drafted - 1).repeat_interleave(width)[None],
            self._cache.attend_from(start, torch.cat([prefix, *nodes], dim=1)[None, None]),
        )
        return branch(self._bound, frontier, output.view(roots, width, -1), is_last)
