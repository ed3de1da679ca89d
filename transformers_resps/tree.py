"""Draft trees: the shape that a policy chooses, the pool of nodes that a drafter proposes, and the verified tree.

Letters of tensor shapes in the whole package: b batch rows, n tree nodes, m nodes of the accepted path, p pool nodes,
w nodes of one drafted level, e cache entries of the levels before it, k `top_k`; s cached positions, t positions of
one pass, q query positions among these; v vocabulary, d draft vocabulary, h hidden size, hd width of an attention
head, F width of the features (layers that the head reads times the target's hidden size); a actions (tree shapes).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf, log
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The size of a draft tree; a policy chooses one for each step.

    `TreeShape(1, 0, 1)` is a plain step, `TreeShape(n + 1, n, 1)` a chain of n drafted tokens, and
    `TreeShape(1, 0, 1, lookup=8)` drafts only by lookup, without a head.

    Args:
        total_tokens: number of nodes that the target verifies, root included; at least 1.
        depth: number of levels that the head drafts; a step accepts at most one token of each level.
        top_k: number of children of a node, and of nodes per level that get children; at least 1.
        lookup: maximum number of looked-up nodes, which are added to the `total_tokens` nodes.

    Raises a `ValueError` if a size is too small or not an integer.
    """

    total_tokens: int
    depth: int
    top_k: int
    lookup: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("total_tokens", 1), ("depth", 0), ("top_k", 1), ("lookup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(
                    f"TreeShape got `{name}={value!r}`, but it must be an integer of at least {minimum}. "
                    "`TreeShape(1, 0, 1)` is a plain step, without drafting."
                )

    @classmethod
    def from_eagle(cls, total_token: int, depth: int, top_k: int) -> "TreeShape":
        """Convert EAGLE's numbers, whose `depth` does not count the first level: its 60/7/10 drafts 8 levels."""
        return cls(total_token, depth + 1, top_k)

    @classmethod
    def plain(cls) -> "TreeShape":
        """Return the shape of a plain step, which drafts nothing."""
        return cls(1, 0, 1)

    def __str__(self) -> str:
        """Return "total_tokens/depth/top_k+lookup", such as "8/4/2+6", "8/4/2" or "+6"; "plain" for a plain step."""
        if self.is_plain:
            return "plain"
        head = f"{self.total_tokens}/{self.depth}/{self.top_k}" if self.asks_head else ""
        return f"{head}+{self.lookup}" if self.lookup else head

    @property
    def asks_head(self) -> bool:
        """Whether the head drafts in a step of this shape."""
        return self.total_tokens > 1 and self.depth > 0

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return not self.asks_head and self.lookup == 0

    def within(self, depth: int) -> "TreeShape":
        """Return this shape, reduced to at most `depth` levels and at most `depth` looked-up nodes."""
        if depth >= self.depth and depth >= self.lookup:
            return self
        depth = max(depth, 0)
        return TreeShape(self.total_tokens, min(self.depth, depth), self.top_k, min(self.lookup, depth))


class Pricing(NamedTuple):
    """Facts that determine the cost of a target forward, apart from its number of nodes."""

    # Whether each path of a tree costs time, as in the exact mode (`invariant`) without compiled code, where each path
    # has its own copy of the keys.
    paths_cost: bool = False
    # Whether no padding is computed, so that the cost depends on the nodes of all rows, see `StepRecord.computed`.
    packs_rows: bool = False
    least_nodes: int = 1  # trees with fewer nodes are padded to this number, and cost the same


class Branches(NamedTuple):
    """Nodes below the root for one row's tree, every parent before its children."""

    tokens: Sequence[int]
    parents: Sequence[int]  # -1 is the root
    probs: Sequence[float]  # probability of the path to each node; `with_branches` adds no nodes of probability 0
    proposers: Sequence[int] = ()  # flags of each node, see `DraftTree.proposers`; empty if all come from lookup


def _levels(parents: Sequence[int]) -> list[list[int]]:
    levels, level_of = list[list[int]](), list[int]()
    for node, parent in enumerate(parents):
        level_of.append(1 + level_of[parent] if parent >= 0 else 0)
        if level_of[node] == len(levels):
            levels.append([])
        levels[level_of[node]].append(node)
    return levels


@dataclass(frozen=True, slots=True)
class CandidatePool:
    """The nodes that a drafter proposes below the root, every parent before its children."""

    tokens: Tensor  # [b, p] target vocabulary ids
    parents: Tensor  # [b, p] index of the parent in the pool; -1 is the root
    scores: Tensor  # [b, p] fp32 log probability of the path to each node, never above the parent's
    levels: Tensor  # [p] level of each node; 1 for children of the root

    @classmethod
    def from_branches(cls, rows: Sequence[Branches]) -> "CandidatePool":
        """Make a pool on the CPU from each row's nodes; smaller levels are padded with nodes of probability 0."""
        levels = [_levels(row.parents) for row in rows]
        depth = max(map(len, levels), default=0)
        widths = [max(len(row[level]) for row in levels if level < len(row)) for level in range(depth)]
        starts = list(accumulate(widths, initial=0))
        below = [-1 if level == 0 else starts[level - 1] for level, width in enumerate(widths) for _ in range(width)]
        tokens, probs = [[0] * starts[-1] for _ in rows], [[0.0] * starts[-1] for _ in rows]
        parents = [below.copy() for _ in rows]
        for row, (row_levels, nodes) in enumerate(zip(levels, rows, strict=True)):
            new = {node: starts[level] + at for level, part in enumerate(row_levels) for at, node in enumerate(part)}
            for node, index in new.items():
                tokens[row][index], probs[row][index] = nodes.tokens[node], nodes.probs[node]
                parents[row][index] = -1 if nodes.parents[node] < 0 else new[nodes.parents[node]]
        shape = len(rows), starts[-1]
        token_ids, parent_ids = (torch.tensor(part, dtype=torch.long).view(shape) for part in (tokens, parents))
        level_of = torch.arange(1, depth + 1).repeat_interleave(torch.tensor(widths, dtype=torch.long))
        return cls(token_ids, parent_ids, torch.tensor(probs, dtype=torch.float).view(shape).log(), level_of)

    @classmethod
    def merged(cls, pools: Sequence["CandidatePool"]) -> "CandidatePool":
        """Join pools of the same roots on the CPU. Of equal paths, the first gets the best score, the others -inf."""
        levels = torch.cat([pool.levels for pool in pools])
        order = levels.sort(stable=True).indices
        new_places = order.argsort().tolist()
        rows = []
        for row in range(len(pools[0].tokens)):
            row_tokens, row_parents, row_scores = list[int](), list[int](), list[float]()
            known: dict[tuple[int, int], int] = {}
            for pool in pools:
                places: list[int] = []
                nodes = (part[row].tolist() for part in (pool.tokens, pool.parents, pool.scores))
                for token, parent, score in zip(*nodes, strict=True):
                    parent = -1 if parent < 0 else places[parent]
                    places.append(known.setdefault((parent, token), len(row_tokens)))
                    is_new = places[-1] == len(row_tokens)
                    if not is_new:
                        row_scores[places[-1]] = max(row_scores[places[-1]], score)
                    row_tokens.append(token)
                    row_parents.append(-1 if parent < 0 else new_places[parent])
                    row_scores.append(score if is_new else -inf)
            rows.append((row_tokens, row_parents, row_scores))
        tokens, parents, scores = (torch.tensor(part)[:, order] for part in zip(*rows, strict=True))
        return cls(tokens, parents, scores, levels[order])

    def with_an_end(self) -> "CandidatePool":
        """Return a copy with one more node at the end, to use as padding: a child of the root with probability 0."""
        tokens, parents, scores = (
            pad(part, (0, 1), value=value)
            for part, value in ((self.tokens, 0), (self.parents, -1), (self.scores, -inf))
        )
        return CandidatePool(tokens, parents, scores, pad(self.levels, (0, 1), value=1))

    def drafted_match(self, tokens: list[list[int]]) -> list[int]:
        """Return, for each row of `tokens` `[b, m]`, how many first tokens form a path in the pool from the root."""
        rows = zip(self.tokens.tolist(), self.parents.tolist(), tokens, strict=True)
        return [len(followed(*row, -1)) for row in rows]

    def nodes_along(self, path: Tensor) -> Tensor:
        """Return the pool indices `[b, m]` of nodes along the tokens `path` `[b, m]`; -1 once a node is missing."""
        return self.nodes_of(path, torch.arange(-1, path.shape[1] - 1).expand(path.shape))

    def nodes_of(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Return the pool's indices `[b, m]` of nodes given as tokens and parents (-1: root); -1 for missing paths."""
        nodes = tokens.new_full((len(tokens), tokens.shape[1] + 1), -1)  # the root is last, so index -1 finds it
        is_there = torch.zeros_like(nodes, dtype=torch.bool)
        is_there[:, -1] = True
        for place, (token, parent) in enumerate(zip(tokens.split(1, dim=1), parents.split(1, dim=1), strict=True)):
            parent = parent.to(nodes.device) % nodes.shape[1]
            hits = (self.tokens == token) & (self.parents == nodes.gather(1, parent)) & is_there.gather(1, parent)
            is_there[:, place] = hits.any(-1)
            nodes[:, place] = torch.where(is_there[:, place], hits.int().argmax(-1), -1)
        return nodes[:, :-1]

    def discounted(self, discounts: Sequence[float]) -> "CandidatePool":
        """Return a copy with `discounts` (see `Policy.discounts`) added to the scores, one number for each level."""
        if not discounts:
            return self
        of_levels = self.scores.new_tensor(discounts)[(self.levels - 1).clamp(max=len(discounts) - 1)]
        return replace(self, scores=self.scores + of_levels)

    def on_host(self) -> "CandidatePool":
        if self.tokens.device.type == "cpu":
            return self
        host = torch.device("cpu")
        tokens, parents, scores = moved([self.tokens, self.parents, self.scores], host)
        return CandidatePool(tokens, parents, scores, self.levels.to(host))


def followed(tokens: list[int], parents: list[int], path: Sequence[int], root: int) -> list[int]:
    """Return the nodes of one row along the tokens of `path`, starting below `root`, until a node is missing."""
    # Uses lists: every step calls this function, and for so few nodes tensor operations would take longer
    node, nodes = root, []
    for token in path:
        child = next((i for i, other in enumerate(tokens) if other == token and parents[i] == node and i > node), None)
        if child is None:
            break
        nodes.append(child)
        node = child
    return nodes


@dataclass(frozen=True, slots=True)
class DraftTree:
    """The tree of one target forward. Node 0 is the root: the newest token, which is not in the target's cache yet.

    Attributes:
        tokens: `[b, n]` target vocabulary ids.
        parents: `[b, n]` index of each node's parent, smaller than the node's own; the root is its own parent.
        depths: `[b, n]` distance to the root.
        ancestors: `[b, n, n]` bool; `[., i, j]` is true if j is on the path from the root to i, or i itself.
        scores: `[b, n]` fp32 log probability of the path to each node, the highest of all sources; 0 for the root.
        level_count: upper bound on the number of levels below the root; an int, so no transfer from the device.
        proposers: for each row and node, flags of the sources that proposed the node (`DRAFTED`, `LOOKED_UP`,
            `REMEMBERED`); empty if all nodes come from the drafter.
        sizes: number of real nodes of each row, which come before its padding; empty without padding.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    scores: Tensor
    level_count: int
    proposers: Sequence[Sequence[int]] = ()
    sizes: Sequence[int] = ()

    @property
    def node_count(self) -> int:
        return self.tokens.shape[1]

    @property
    def row_sizes(self) -> Sequence[int]:
        """Number of real nodes of each row, without padding."""
        return self.sizes or [self.node_count] * len(self.tokens)

    @classmethod
    def root_only(cls, root: Tensor) -> "DraftTree":
        """Make a plain step's tree from the newest tokens `[b]`."""
        tokens = root[:, None]
        zeros = torch.zeros_like(tokens)
        return cls(tokens, zeros, zeros, torch.ones_like(tokens, dtype=torch.bool)[..., None], zeros.float(), 0)

    @classmethod
    def from_parents(cls, tokens: Tensor, parents: Tensor, scores: Tensor | None = None) -> "DraftTree":
        """Make a tree from tokens and parents `[b, n]`; raises `ValueError` if a parent comes after its child."""
        node_count = tokens.shape[1]
        order = torch.arange(node_count, device=tokens.device)
        if node_count > 1 and not bool(((parents[:, 1:] < order[1:]) & (parents[:, 1:] >= 0)).all()):
            raise ValueError(
                f"DraftTree got the parents {parents.tolist()}, but a parent must be an earlier node. "
                "Sort the nodes so that parents come first."
            )
        parents = parents.clone()
        parents[:, 0] = 0
        return cls._derive(tokens, parents, torch.zeros(tokens.shape) if scores is None else scores, node_count - 1)

    @classmethod
    def from_pool(
        cls,
        root: Tensor,
        pool: CandidatePool,
        total_tokens: int,
        level_count: int | None = None,
        sizes: Sequence[int] = (),
    ) -> "DraftTree":
        """Make the tree of `root`, the newest tokens `[b]`, and the `total_tokens - 1` best nodes of the pool.

        This is the reranking of EAGLE-2 (arXiv 2406.16858) section 4.2. The parent of a kept node is always kept, even
        if scores tie: the sort is stable, and a parent comes before its children and never has a lower score.

        `level_count` is the number of the pool's levels; `None` reads it from a tensor, which traced code cannot do.
        `sizes` is the number of nodes of each row, root included, if some rows get fewer than `total_tokens`.
        """
        kept = min(total_tokens - 1, pool.tokens.shape[1])
        if kept and level_count is None:
            level_count = int(pool.levels[-1])
        best = pool.scores.sort(dim=-1, descending=True, stable=True).indices[:, :kept]  # [b, n-1]
        if sizes:
            pool = pool.with_an_end()
            is_padding = torch.arange(1, kept + 1) >= torch.tensor(sizes)[:, None]
            best = best.masked_fill(is_padding, pool.tokens.shape[1] - 1)
        best = best.sort(dim=-1).values
        # A parent's index in the tree is its rank among the kept nodes, from 1 on; the root, -1, gets 0.
        parents = torch.searchsorted(best, pool.parents.gather(1, best), right=True)
        tree = cls._derive(
            torch.cat([root[:, None], pool.tokens.gather(1, best)], dim=1),
            pad(parents, (1, 0)),
            pad(pool.scores.gather(1, best), (1, 0)),
            min(level_count or 0, kept),
        )
        return replace(tree, sizes=sizes) if sizes else tree

    @classmethod
    def _derive(cls, tokens: Tensor, parents: Tensor, scores: Tensor, level_count: int) -> "DraftTree":
        """Make a tree and compute its ancestors: each squaring of the parent matrix doubles the distance covered."""
        seen = _itself(tokens, tokens.shape[1], torch.float32)
        seen.scatter_(2, parents[..., None], 1.0)
        for squaring in range((level_count - 1).bit_length() if level_count else 0):
            seen = seen @ seen  # number of ways from a node to each ancestor
            if squaring > 3:
                seen = seen.clamp_(max=1.0)  # before the numbers overflow
        ancestors = seen > 0
        return cls(tokens, parents, ancestors.sum(-1) - 1, ancestors, scores, level_count)

    def with_branches(self, rows: Sequence[Branches]) -> "DraftTree":
        """Return a CPU copy with each row's nodes added. Equal paths merge; new nodes of probability 0 are dropped."""
        own = zip(self.row_sizes, self.tokens.tolist(), self.parents.tolist(), self.scores.tolist(), rows, strict=True)
        joined = [_Nodes(*(part[:size] for part in mine)).with_branches(more) for size, *mine, more in own]
        sizes = [len(row.tokens) for row in joined]
        node_count = max(sizes)
        for row in joined:
            row.pad(node_count)
        depths, ancestors = _lines([row.parents for row in joined])
        # NumPy converts lists three times as fast as torch
        parts = [row.tokens for row in joined], [row.parents for row in joined], depths
        tokens, parents, distances = (torch.from_numpy(np.array(part, np.int64)) for part in parts)
        scores = torch.from_numpy(np.array([row.scores for row in joined], np.float32))
        proposers = [row.proposers for row in joined]
        sizes = [] if min(sizes) == node_count else sizes
        return DraftTree(tokens, parents, distances, ancestors, scores, max(map(max, depths)), proposers, sizes)

    def below(self, root: Tensor) -> "DraftTree":
        """Return a copy with the tokens `root` `[b]` as root, on their device; one transfer copies all tensors."""
        if self.node_count == 1:
            return DraftTree.root_only(root)
        own = [self.tokens, self.parents, self.depths, self.scores, self.ancestors]
        tokens, parents, depths, scores, ancestors = moved(own, root.device)
        tokens[:, 0] = root
        return replace(self, tokens=tokens, parents=parents, depths=depths, ancestors=ancestors, scores=scores)

    def padded(self, node_count: int) -> "DraftTree":
        """Return the tree padded to `node_count` nodes, for use in the target's forward only.

        A padding node has the root's position, attends only to itself, and no other node attends to it.
        """
        missing = node_count - self.node_count
        if missing == 0:
            return self
        tokens, parents, depths = (pad(part, (0, missing)) for part in (self.tokens, self.parents, self.depths))
        ancestors = _itself(self.tokens, node_count, torch.bool)
        ancestors[:, : self.node_count, : self.node_count] = self.ancestors
        return DraftTree(tokens, parents, depths, ancestors, pad(self.scores, (0, missing)), self.level_count)

    def row(self, index: int) -> "DraftTree":
        """Return the tree of one row without its padding, as a batch of one."""
        own, nodes = slice(index, index + 1), slice(self.row_sizes[index])
        tokens, parents, depths, scores = (
            part[own, nodes] for part in (self.tokens, self.parents, self.depths, self.scores)
        )
        levels = min(self.level_count, self.row_sizes[index] - 1)
        return DraftTree(tokens, parents, depths, self.ancestors[own, nodes, nodes], scores, levels)

    def drafted_match(self, tokens: list[list[int]]) -> list[int]:
        """Return, for each row of `tokens` `[b, m]`, how many of its first tokens form a path below the root."""
        rows = zip(self.row_sizes, self.tokens.tolist(), self.parents.tolist(), tokens, strict=True)
        return [len(followed(own[:size], parents, path, 0)) for size, own, parents, path in rows]

    def children(self) -> list[dict[tuple[int, int], int]]:
        """Return a dict per row that maps (node, token) to the node's first child with that token."""
        return first_children(self.row_sizes, self.parents.tolist(), self.tokens.tolist())


def _itself(tokens: Tensor, node_count: int, dtype: torch.dtype) -> Tensor:
    """Return one identity matrix per row of `tokens`, `[b, n, n]` for n nodes: each node is its own ancestor."""
    itself = torch.eye(node_count, dtype=dtype, device=tokens.device)
    return itself.expand(len(tokens), -1, -1).contiguous()  # each row is written to


def _lines(rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
    """Compute depths and ancestors `[b, n, n]` from each row's parents; faster than `_derive` if nodes are few."""
    depths, seen = list[list[int]](), bytearray()
    for parents in rows:
        lines, levels = [bytearray(len(parents))], [0]
        lines[0][0] = 1
        for node, parent in enumerate(parents[1:], start=1):
            line = lines[parent].copy()
            line[node] = 1
            lines.append(line)
            levels.append(levels[parent] + 1)
        depths.append(levels)
        seen += b"".join(lines)
    return depths, torch.frombuffer(seen, dtype=torch.bool).view(len(rows), -1, len(rows[0]))


def first_children(
    sizes: Sequence[int], parents: list[list[int]], tokens: list[list[int]]
) -> list[dict[tuple[int, int], int]]:
    """Return a dict per row that maps (parent, token) to the first such child; `sizes` count nodes without padding."""
    return [  # reversed, so that the first of equal children wins
        {(above[node], own[node]): node for node in range(size - 1, 0, -1)}
        for size, above, own in zip(sizes, parents, tokens, strict=True)
    ]


# Flags of `DraftTree.proposers`: the drafter, lookup in the text of the call, lookup in a memory of other texts.
DRAFTED, LOOKED_UP, REMEMBERED = 1, 2, 4


class _Nodes:
    """The nodes of one row of a tree, in lists, because lists are faster than tensors for so few nodes."""

    def __init__(self, tokens: list[int], parents: list[int], scores: list[float]) -> None:
        self.tokens, self.parents, self.scores = tokens, parents, scores
        self.proposers = [DRAFTED] * len(tokens)
        (self._children,) = first_children([len(tokens)], [parents], [tokens])

    def with_branches(self, more: Branches) -> "_Nodes":
        """Add nodes, except new ones of probability 0; equal paths merge and keep the best score and all flags."""
        new: list[int] = []  # index in this tree of each node of `more`
        all_flags = more.proposers or [LOOKED_UP] * len(more.tokens)
        for token, parent, prob, flags in zip(*more[:3], all_flags, strict=True):
            above = 0 if parent < 0 else new[parent]
            node = self._children.get((above, token), -1 if prob == 0.0 else len(self.tokens))
            new.append(node)
            if node == len(self.tokens):
                self._append(token, above, log(prob), flags)
                self._children[above, token] = node
            elif node > 0:
                self.scores[node] = max(self.scores[node], log(prob) if prob else -inf)
                self.proposers[node] |= flags
        return self

    def pad(self, node_count: int) -> None:
        for _ in range(node_count - len(self.tokens)):
            self._append(0, 0, -inf, 0)

    def _append(self, token: int, parent: int, score: float, proposers: int) -> None:
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(score)
        self.proposers.append(proposers)


def moved(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy the tensors `parts` to a device in one transfer. Larger dtypes must come first, for alignment."""
    joined = torch.cat([part.flatten().view(torch.uint8) for part in parts])
    joined = joined.to(device, non_blocking=device.type != "cpu")  # the host reads its copy immediately
    blocks = joined.split([part.numel() * part.element_size() for part in parts])
    return [block.view(part.dtype).view(part.shape) for block, part in zip(blocks, parts, strict=True)]
