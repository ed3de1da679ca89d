"""What a tree of any shape would have emitted at every position of a recorded text.

A tree's outcome is the longest of its paths that the text follows, so one recording gives the outcome of all shapes:
no clock, no noise, no exploration. It is exact for greedy decoding, and correct in distribution for sampling, because
a tree does not depend on the target's draws.

Tensor shapes: t positions, d levels, F features.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..drafting.continuations import LONGEST_DRAFT
from ..drafting.prompt_lookup import Lookup
from ..policies.action_grid import ActionGrid
from ..policies.costs import CostModel
from ..tree import CandidatePool, TreeShape, followed
from .outcomes import TextOutcomes
from .recorded_text import RecordedText, open_recording


_NEVER = torch.iinfo(torch.int32).max  # rank of a token that no node carries
_LOOKED_UP = 16  # nodes that are ranked; no shape of a grid has more
_CONTEXT_BUCKET = 16  # positions that share a cost: costs vary slowly with the context
_TENSORS = ("features", "ranks", "looked_up_ranks", "lookups", "proposed")
_SIZES = ("context_length", "spare_room")


@dataclass(frozen=True, slots=True)
class RankedText:
    """A recorded text, reduced to what gives the outcome of every shape at every position.

    `ranks` are `[t, K, D, D]` int32; at `[., k, d - 1, l - 1]` the rank of the text's own node of level l in a pool of
    d levels with the k-th `top_k`, best first: a tree of n nodes holds the ranks below n - 1.
    """

    FORMAT: ClassVar[int] = 3  # of files

    features: Tensor  # [t, F] what a policy sees before the step at each position, in the target's dtype
    ranks: Tensor
    looked_up_ranks: Tensor  # `[t, K, D, m]` likewise of the looked-up nodes, best first
    lookups: Tensor  # [t, L] rank of the text's own node of each level among the looked-up ones
    proposed: Tensor  # [t] looked-up nodes
    top_ks: tuple[int, ...]  # the K that were drafted
    context_length: int  # positions of the text before the first step
    spare_room: int  # how many more tokens the text could have had
    block_nodes: int = 0  # see `RecordedText`

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def from_recording(cls, text: RecordedText) -> "RankedText":
        """Reduce a recording to what gives the outcome of every shape."""
        upcoming = text.upcoming(text.depth)
        nodes, lookups, proposed = _lookups(text.input_ids.tolist(), text.prompt_length)
        path = upcoming, torch.arange(-1, text.depth - 1).expand(upcoming.shape)
        ranks, looked_up_ranks = (
            torch.stack([node_ranks(pool, *wanted) for pool in text.pools.values()], dim=1) for wanted in (path, nodes)
        )
        top_ks, start = tuple(text.pools), text.prompt_length + 1
        sizes = start, text.spare_room, text.block_nodes
        return cls(text.features, ranks, looked_up_ranks, lookups, proposed, top_ks, *sizes)

    def emitted(self, shape: TreeShape) -> Tensor:
        """Tokens `[t]` that a step of `shape` adds at each position, at most those that are left.

        Raises:
            ValueError: the text was not recorded for such a shape.
        """
        most_levels, nodes = self.ranks.shape[-1], self.block_nodes
        is_larger = shape.depth > most_levels or 0 < nodes < shape.total_tokens - 1
        if shape.asks_head and (shape.top_k not in self.top_ks or is_larger):
            kept = f"up to {most_levels} levels" + f" and {nodes} nodes" * bool(nodes)
            raise ValueError(
                f"Got {shape}, but the text was recorded for top_k {list(self.top_ks)} and {kept}. Record it again "
                "with `record_pools(..., depths=depths_of(grid))`, for a grid that has it."
            )
        accepted = (self.lookups < self._room.clamp(max=shape.lookup)[:, None]).sum(-1)
        if shape.asks_head:
            accepted = torch.maximum(accepted, self._kept(self.ranks, shape).sum(-1))
        return (accepted + 1).minimum(self._left)

    @property
    def _left(self) -> Tensor:
        return len(self) - torch.arange(len(self))

    @property
    def _room(self) -> Tensor:
        """`[t]` how many levels a draft may have, and how many nodes are looked up at most."""
        return self._left - 1 + self.spare_room

    def _kept(self, ranks: Tensor, shape: TreeShape) -> Tensor:
        """`[t, m]` whether the head's tree of `shape` holds each of the nodes."""
        depth = self._room.clamp(max=shape.depth)  # [t]
        rows = ranks[torch.arange(len(self)), self.top_ks.index(shape.top_k), (depth - 1).clamp(min=0)]
        return (rows < shape.total_tokens - 1) & (depth > 0)[:, None]

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
            added = added - self._kept(self.looked_up_ranks[..., : shape.lookup], shape).sum(-1)
        return torch.tensor(seconds, dtype=torch.float64)[bucket_of, added]

    def save(self, file: str | Path) -> None:
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        sizes = {name: str(getattr(self, name)) for name in (*_SIZES, "block_nodes")}
        save_file(tensors, file, sizes | {"top_ks": ",".join(map(str, self.top_ks))})

    @classmethod
    def load(cls, file: str | Path) -> "RankedText":
        """Read what `save` of this release wrote; raises `ValueError` for a file that is damaged or something else."""
        with open_recording(file, "ranks") as (opened, metadata):
            read: dict[str, Any] = {name: opened.get_tensor(name) for name in _TENSORS}
            read |= {name: int(metadata[name]) for name in _SIZES}
            read["block_nodes"] = int(metadata.get("block_nodes", 0))  # recordings of draft heads stay readable
            return cls(**read, top_ks=tuple(map(int, metadata["top_ks"].split(","))))


def depths_of(grid: ActionGrid) -> dict[int, int]:
    """What `record_pools` has to draft for a grid: every `top_k` of its shapes, to the greatest depth."""
    asking = [shape for shape in grid.shapes if shape.asks_head]
    depth = max((shape.depth for shape in asking), default=0)
    return {top_k: depth for top_k in sorted({shape.top_k for shape in asking})}


def node_ranks(pool: CandidatePool, tokens: Tensor, parents: Tensor) -> Tensor:
    """Ranks of nodes in pools cut to 1, 2, ... levels: `[r, D, m]`, as in `RankedText.ranks`.

    `pool` has r roots and D levels; `tokens` and `parents` `[r, m]` are those of nodes below each root, a token -1
    being none.
    """
    scores, levels = pool.scores, pool.levels
    order, depth = torch.arange(len(levels)), int(levels[-1])
    ranks = torch.full((len(tokens), depth, tokens.shape[1]), _NEVER, dtype=torch.int32)
    for place, node in enumerate(pool.nodes_of(tokens, parents).split(1, dim=1)):
        score, level = scores.gather(1, node.clamp(min=0)), levels[node.clamp(min=0)[:, 0]]
        before = (scores > score) | ((scores == score) & (order < node))  # the stable sort of `DraftTree.from_pool`
        for drafted in range(1, depth + 1):
            rank = (before & (levels <= drafted)).sum(-1)
            is_held = (node[:, 0] >= 0) & (level <= drafted)
            ranks[:, drafted - 1, place] = torch.where(is_held, rank, _NEVER).int()
    return ranks


def _lookups(tokens: list[int], prompt_length: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """At each place the looked-up nodes, tokens and parents `[t, m]`, the best first, a token -1 being none; the ranks
    of the text's own nodes among them `[t, L]`; and how many there are `[t]`.
    """
    lookup = Lookup()
    nodes, above, ranks, counts = [], [], [], []
    for place in range(prompt_length, len(tokens) - 1):
        lookup.extend(tokens[lookup.length : place + 1])
        found = lookup.found.grow(_LOOKED_UP)
        counts.append(len(found.tokens))
        nodes.append([*found.tokens, *[-1] * (_LOOKED_UP - counts[-1])])
        above.append([*found.parents, *[-1] * (_LOOKED_UP - counts[-1])])
        path = followed(found.tokens, found.parents, tokens[place + 1 :], -1)
        ranks.append([*path, *[_NEVER] * (LONGEST_DRAFT - len(path))])
    return (torch.tensor(nodes), torch.tensor(above)), torch.tensor(ranks), torch.tensor(counts)
