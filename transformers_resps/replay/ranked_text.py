"""Computes how many tokens a tree of any shape emits at every position of a recorded text.

A step accepts the longest path of its tree that matches the text, so one recording gives the result of all shapes
without noise or exploration. The result is exact for greedy decoding. For sampling, the distribution of the result is
exact, because a tree does not depend on the target's random draws.

Tensor shapes: t positions, D levels, K values of `top_k`, L levels of lookup, m looked-up nodes, F features.
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


_NEVER = torch.iinfo(torch.int32).max  # Rank of a token that no node proposes.
_LOOKED_UP = 16  # Number of looked-up nodes that are ranked; no shape of a grid has more.
_CONTEXT_BUCKET = 16  # Number of successive positions that share one cost, since costs vary slowly with the context.
_TENSORS = ("features", "ranks", "looked_up_ranks", "lookups", "proposed")
_SIZES = ("context_length", "spare_room", "block_nodes")


@dataclass(frozen=True, slots=True)
class RankedText:
    """A recorded text, reduced to the ranks of its tokens among the head's drafts.

    `ranks[., k, d - 1, l - 1]` is the rank by score, from 0, of the text's token at level l in a draft of d levels
    with the k-th `top_k`. A tree of n nodes contains its root and the n - 1 nodes of the lowest ranks.
    """

    FORMAT: ClassVar[int] = 4  # version of the file format

    features: Tensor  # [t, F] input of a policy before the step at each position, in the target's dtype
    ranks: Tensor  # [t, K, D, D] int32
    looked_up_ranks: Tensor  # [t, K, D, m] int32 ranks of the looked-up nodes in the same drafts
    lookups: Tensor  # [t, L] rank of the text's token at each level among the looked-up nodes
    proposed: Tensor  # [t] number of nodes that lookup proposes
    top_ks: tuple[int, ...]  # the K recorded values of `top_k`
    context_length: int  # number of positions of the text before the first step
    spare_room: int  # see `record_pools`
    block_nodes: int = 0  # see `RecordedText`

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def from_recording(cls, text: RecordedText) -> "RankedText":
        """Rank the upcoming tokens and the looked-up nodes of each position among the nodes of the recorded pools."""
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
        """Return the number of tokens `[t]` of a step at each position; raises `ValueError` for unrecorded shapes."""
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
        """Maximum number `[t]` of drafted levels, and of looked-up nodes, at each position."""
        return self._left - 1 + self.spare_room

    def _kept(self, ranks: Tensor, shape: TreeShape) -> Tensor:
        """Return a mask `[t, m]`: which of m nodes a tree of `shape` contains, by their ranks `[t, K, D, m]`."""
        depth = self._room.clamp(max=shape.depth)  # [t]
        rows = ranks[torch.arange(len(self)), self.top_ks.index(shape.top_k), (depth - 1).clamp(min=0)]
        return (rows < shape.total_tokens - 1) & (depth > 0)[:, None]

    def outcomes(self, grid: ActionGrid, costs: CostModel) -> TextOutcomes:
        """Compute a step's tokens and seconds for each shape and position; a node of head and lookup counts once."""
        emitted = torch.stack([self.emitted(shape) for shape in grid.shapes], dim=1)
        taken = torch.stack([self._seconds(shape, costs) for shape in grid.shapes], dim=1)
        return TextOutcomes(self.features, emitted, taken, grid)

    def _seconds(self, shape: TreeShape, costs: CostModel) -> Tensor:
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
        sizes = {name: str(getattr(self, name)) for name in _SIZES}
        save_file(tensors, file, sizes | {"top_ks": ",".join(map(str, self.top_ks))})

    @classmethod
    def load(cls, file: str | Path) -> "RankedText":
        """Load a saved text; raises `ValueError` if this release cannot read the file."""
        with open_recording(file, "ranks") as (opened, metadata):
            fields: dict[str, Any] = {name: opened.get_tensor(name) for name in _TENSORS}
            fields |= {name: int(metadata[name]) for name in _SIZES}
            return cls(**fields, top_ks=tuple(map(int, metadata["top_ks"].split(","))))


def depths_of(grid: ActionGrid) -> dict[int, int]:
    """Return the argument `depths` of `record_pools` for a grid: maps each `top_k` to the grid's greatest depth."""
    asking = [shape for shape in grid.shapes if shape.asks_head]
    depth = max((shape.depth for shape in asking), default=0)
    return {top_k: depth for top_k in sorted({shape.top_k for shape in asking})}


def node_ranks(pool: CandidatePool, tokens: Tensor, parents: Tensor) -> Tensor:
    """Rank nodes by score among the pool's first 1, 2, ... D levels; return the ranks `[r, D, m]` for r roots.

    `tokens` and `parents` `[r, m]` are m nodes below each root; -1 as token means no node. Missing nodes rank last.
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
    """Run lookup at each position.

    Returns the nodes' tokens and parents `[t, m]`, best first, padded with -1; the rank `[t, L]` of the text's token
    of each level among the nodes; and the number of nodes `[t]`.
    """
    lookup = Lookup()
    nodes, parents, ranks, counts = [], [], [], []
    for position in range(prompt_length, len(tokens) - 1):
        lookup.extend(tokens[len(lookup) : position + 1])
        found = lookup.found.grow(_LOOKED_UP)
        counts.append(len(found.tokens))
        nodes.append([*found.tokens, *[-1] * (_LOOKED_UP - counts[-1])])
        parents.append([*found.parents, *[-1] * (_LOOKED_UP - counts[-1])])
        path = followed(found.tokens, found.parents, tokens[position + 1 :], -1)
        ranks.append([*path, *[_NEVER] * (LONGEST_DRAFT - len(path))])
    return (torch.tensor(nodes), torch.tensor(parents)), torch.tensor(ranks), torch.tensor(counts)
