"""What a tree of any shape would have emitted at every position of a recorded text.

A tree's outcome is the longest of its paths that the text follows, so one recording gives the outcome of all shapes:
no clock, no noise, no exploration. It is exact for greedy decoding, and correct in distribution for sampling, because
a tree does not depend on the target's draws.

Tensor shapes: t positions, d levels, F features.
"""

from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..drafting.prompt_lookup import Lookup
from ..policies.action_grid import ActionGrid
from ..policies.costs import CostModel
from ..tree import CandidatePool, TreeShape
from .outcomes import TextOutcomes
from .recorded_text import RecordedText, open_recording


_NEVER = torch.iinfo(torch.int32).max  # rank of a token that no node carries
_CONTEXT_BUCKET = 16  # positions that share a cost: costs vary slowly with the context
_TENSORS = ("features", "ranks", "chain_ranks", "lookups", "proposed")
_SIZES = ("context_length", "spare_room")


@dataclass(frozen=True, slots=True)
class RankedText:
    """A recorded text, reduced to what gives the outcome of every shape at every position.

    `ranks` are `[t, K, D, D]` int32; at `[., k, d - 1, l - 1]` the rank of the text's own node of level l in a pool of
    d levels with the k-th `top_k`, best first: a tree of n nodes holds the ranks below n - 1.
    """

    FORMAT: ClassVar[int] = 2  # of files

    features: Tensor  # [t, F] what a policy sees before the step at each position, in the target's dtype
    ranks: Tensor
    chain_ranks: Tensor  # likewise of the looked-up continuation's nodes
    lookups: Tensor  # [t] looked-up tokens that the text follows
    proposed: Tensor  # [t] looked-up tokens, that is nodes to verify, followed or not
    top_ks: tuple[int, ...]  # the K that were drafted
    context_length: int  # positions of the text before the first step
    spare_room: int  # how many more tokens the text could have had

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def from_recording(cls, text: RecordedText) -> "RankedText":
        """Reduce a recording to what gives the outcome of every shape."""
        upcoming = text.upcoming(text.depth)
        chains, followed, proposed = _lookups(text.input_ids.tolist(), text.prompt_length, text.depth)
        ranks, chain_ranks = (
            torch.stack([path_ranks(pool, path) for pool in text.pools.values()], dim=1) for path in (upcoming, chains)
        )
        top_ks, start = tuple(text.pools), text.prompt_length + 1
        return cls(text.features, ranks, chain_ranks, followed, proposed, top_ks, start, text.spare_room)

    def emitted(self, shape: TreeShape) -> Tensor:
        """Tokens `[t]` that a step of `shape` adds at each position, at most those that are left.

        Raises:
            ValueError: the text was not recorded for such a shape.
        """
        most_levels = self.ranks.shape[-1]
        if shape.asks_head and (shape.top_k not in self.top_ks or shape.depth > most_levels):
            raise ValueError(
                f"Got {shape}, but the text was recorded for top_k {list(self.top_ks)} and up to {most_levels} "
                "levels. Record it again with `record_pools(..., depths=depths_of(grid))`, for a grid that has it."
            )
        accepted = self.lookups.clamp(max=shape.lookup)
        if shape.asks_head:
            accepted = torch.maximum(accepted, self._kept(self.ranks, shape))
        return (accepted + 1).minimum(self._left)

    @property
    def _left(self) -> Tensor:
        return len(self) - torch.arange(len(self))

    def _kept(self, ranks: Tensor, shape: TreeShape) -> Tensor:
        """`[t]` nodes of a path, from the root on, that the head's tree of `shape` holds."""
        depth = (self._left - 1 + self.spare_room).clamp(max=shape.depth)  # [t]
        rows = ranks[torch.arange(len(self)), self.top_ks.index(shape.top_k), (depth - 1).clamp(min=0)]
        kept = (rows < shape.total_tokens - 1) & (torch.arange(1, rows.shape[-1] + 1) <= depth[:, None])
        return kept.int().cumprod(-1).sum(-1)

    def outcomes(self, grid: ActionGrid, costs: CostModel) -> TextOutcomes:
        """Tokens and seconds of every action of `grid` at every position; its shapes must have been recorded.

        A shape pays for the looked-up nodes that the head's tree does not hold already.
        """
        emitted = torch.stack([self.emitted(shape) for shape in grid.shapes], dim=1)
        taken = torch.stack([self._seconds(shape, costs) for shape in grid.shapes], dim=1)
        return TextOutcomes(self.features, emitted, taken, grid)

    def _seconds(self, shape: TreeShape, costs: CostModel) -> Tensor:
        """`[t]` fp64."""
        buckets = (self.context_length + torch.arange(len(self))) // _CONTEXT_BUCKET
        contexts, bucket_of = buckets.unique(return_inverse=True)
        shapes = [replace(shape, lookup=count) for count in range(shape.lookup + 1)]
        seconds = [[costs.step_seconds(one, int(context) * _CONTEXT_BUCKET) for one in shapes] for context in contexts]
        added = self.proposed.clamp(max=shape.lookup)
        if shape.asks_head:
            added = (added - self._kept(self.chain_ranks, shape)).clamp(min=0)
        return torch.tensor(seconds, dtype=torch.float64)[bucket_of, added]

    def save(self, file: str | Path) -> None:
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        sizes = {name: str(getattr(self, name)) for name in _SIZES}
        save_file(tensors, file, sizes | {"top_ks": ",".join(map(str, self.top_ks))})

    @classmethod
    def load(cls, file: str | Path) -> "RankedText":
        """Read what `save` of this release wrote; raises `ValueError` for a file that is damaged or something else."""
        with open_recording(file, "ranks") as (opened, metadata):
            read: dict[str, Any] = {name: opened.get_tensor(name) for name in _TENSORS}
            read |= {name: int(metadata[name]) for name in _SIZES}
            return cls(**read, top_ks=tuple(map(int, metadata["top_ks"].split(","))))


def depths_of(grid: ActionGrid) -> dict[int, int]:
    """What `record_pools` has to draft for a grid: every `top_k` of its shapes, to the greatest depth."""
    asking = [shape for shape in grid.shapes if shape.asks_head]
    depth = max((shape.depth for shape in asking), default=0)
    return {top_k: depth for top_k in sorted({shape.top_k for shape in asking})}


def path_ranks(pool: CandidatePool, upcoming: Tensor) -> Tensor:
    """Ranks of a path's nodes in pools cut to 1, 2, ... levels: `[r, D, D]`, as in `RankedText.ranks`.

    `pool` has r roots and D levels; `upcoming` `[r, D]` are the path's tokens after each root, -1 where it has ended.
    """
    scores, levels = pool.scores, pool.levels
    roots, depth = upcoming.shape
    order = torch.arange(len(levels))
    ranks = torch.full((roots, depth, depth), _NEVER, dtype=torch.int32)
    for level, node in enumerate(pool.nodes_along(upcoming).split(1, dim=1), start=1):
        score = scores.gather(1, node.clamp(min=0))
        before = (scores > score) | ((scores == score) & (order < node))  # the stable sort of `DraftTree.from_pool`
        for drafted in range(level, depth + 1):
            rank = (before & (levels <= drafted)).sum(-1, keepdim=True)
            ranks[:, drafted - 1, level - 1] = torch.where(node < 0, _NEVER, rank)[:, 0].int()
    return ranks


def _lookups(tokens: list[int], prompt_length: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Looked-up tokens `[t, depth]`, -1 after their end; how many of all the text follows, and how many there are."""
    lookup = Lookup()
    chains, followed, counts = [], [], []
    for place in range(prompt_length, len(tokens) - 1):
        lookup.extend(tokens[lookup.length : place + 1])
        proposed = lookup.match().tokens
        chains.append([*proposed[:depth], *[-1] * (depth - len(proposed))])
        pairs = zip(proposed, tokens[place + 1 :], strict=False)
        followed.append(len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))))
        counts.append(len(proposed))
    return torch.tensor(chains), torch.tensor(followed), torch.tensor(counts)
