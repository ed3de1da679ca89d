"""Draft trees: the shape that a policy asks for, the pool that a drafter scores, the tree that the target verifies.

Shape legend, used in the whole package: b batch rows, n tree nodes, m nodes of the accepted path, p pool nodes, w
nodes of one drafted level, e entries drafted before it, k `top_k`; s cached positions, t positions of one pass, q
those of them that look at others; v vocabulary, d draft vocabulary, h hidden size, hd width of an attention head, F
width of the features (layers that the head reads times the target's hidden size); a actions of a policy.
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
    """The size of a draft tree, which a policy chooses for each step.

    Args:
        total_tokens: number of nodes that the target verifies, root included; at least 1.
        depth: number of levels that the head drafts. A step accepts at most one token of each; at least 0.
        top_k: number of children of a node, and of nodes of a level that get children; at least 1.
        lookup: maximum number of further nodes that are looked up, in the text and in memories, on top of
            `total_tokens`; at least 0.

    `TreeShape(1, 0, 1)` is a plain step, `TreeShape(n + 1, n, 1)` a chain of n drafted tokens, and
    `TreeShape(1, 0, 1, lookup=8)` looks up without a head.

    Raises:
        ValueError: a size is below its minimum, or is not an integer.
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
        """Convert the shape that EAGLE and Re-SpS write as total_token/depth/top_k; they count one level less.

        Their 60/7/10 drafts 8 levels (`topK_genrate` in SafeAILab/EAGLE: one extend pass and `depth` loops).
        """
        return cls(total_token, depth + 1, top_k)

    @classmethod
    def plain(cls) -> "TreeShape":
        """The shape of a plain step: nothing is drafted, and the target decodes one token."""
        return cls(1, 0, 1)

    def __str__(self) -> str:
        """`8/4/2` for total_tokens/depth/top_k, `8/4/2+6` with lookup nodes, `+6` for those alone, or `plain`."""
        if self.is_plain:
            return "plain"
        head = f"{self.total_tokens}/{self.depth}/{self.top_k}" if self.asks_head else ""
        return f"{head}+{self.lookup}" if self.lookup else head

    @property
    def asks_head(self) -> bool:
        """Whether the head drafts."""
        return self.total_tokens > 1 and self.depth > 0

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return not self.asks_head and self.lookup == 0

    def within(self, depth: int) -> "TreeShape":
        """The same shape with at most `depth` levels."""
        if depth >= self.depth and depth >= self.lookup:
            return self
        depth = max(depth, 0)
        return TreeShape(self.total_tokens, min(self.depth, depth), self.top_k, min(self.lookup, depth))


class Pricing(NamedTuple):
    """What decides about the price of a target forward beside its nodes, as the verifier knows it.

    Attributes:
        paths_cost: whether each further path of a tree takes time, as in the invariant mode without compiled code,
            where each path has keys of its own.
        packs_rows: whether nodes that do not count are not computed, so that rows may have trees of their own sizes. A
            forward is then priced by all its nodes beside the roots: see `StepRecord.computed`.
        least_nodes: that the forward computes for each row at least; smaller trees are filled up and cost the same.
    """

    paths_cost: bool = False
    packs_rows: bool = False
    least_nodes: int = 1


class Branches(NamedTuple):
    """Nodes of one row, every parent before its children.

    Attributes:
        tokens: of each node.
        parents: likewise; -1 is the root.
        probs: of each path. None: a node that stands for none, but tells that it was found.
        proposers: flags of `DraftTree.proposers`; empty for lookup.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    probs: Sequence[float]
    proposers: Sequence[int] = ()


def _levels(parents: Sequence[int]) -> list[list[int]]:
    """The nodes of each level, every parent being before its children."""
    levels, level_of = list[list[int]](), list[int]()
    for node, parent in enumerate(parents):
        level_of.append(1 + level_of[parent] if parent >= 0 else 0)
        if level_of[node] == len(levels):
            levels.append([])
        levels[level_of[node]].append(node)
    return levels


@dataclass(frozen=True, slots=True)
class CandidatePool:
    """The continuations of the root that a drafter proposes, every parent before its children.

    Attributes:
        tokens: `[b, p]` target vocabulary ids.
        parents: `[b, p]` index of the parent in the pool; -1 is the root.
        scores: `[b, p]` fp32, cumulative log probability of the path; never above the parent's.
        levels: `[p]`, 1 for children of the root.
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor
    levels: Tensor

    @classmethod
    def from_branches(cls, rows: Sequence[Branches]) -> "CandidatePool":
        """The nodes of each row: on the host, in the order of their levels.

        A row with fewer nodes on a level than another is filled up with nodes of no probability.
        """
        levels = [_levels(row.parents) for row in rows]
        depth = max(map(len, levels), default=0)
        widths = [max(len(own[level]) for own in levels if level < len(own)) for level in range(depth)]
        starts = list(accumulate(widths, initial=0))
        below = [-1 if level == 0 else starts[level - 1] for level, width in enumerate(widths) for _ in range(width)]
        tokens, probs = [[0] * starts[-1] for _ in rows], [[0.0] * starts[-1] for _ in rows]
        parents = [below.copy() for _ in rows]
        for row, (own, nodes) in enumerate(zip(levels, rows, strict=True)):
            places = {node: starts[level] + at for level, part in enumerate(own) for at, node in enumerate(part)}
            for node, place in places.items():
                tokens[row][place], probs[row][place] = nodes.tokens[node], nodes.probs[node]
                parents[row][place] = -1 if nodes.parents[node] < 0 else places[nodes.parents[node]]
        shape = len(rows), starts[-1]
        node_tokens, above = (torch.tensor(part, dtype=torch.long).view(shape) for part in (tokens, parents))
        level_of = torch.arange(1, depth + 1).repeat_interleave(torch.tensor(widths, dtype=torch.long))
        return cls(node_tokens, above, torch.tensor(probs, dtype=torch.float).view(shape).log(), level_of)

    @classmethod
    def from_chains(cls, chains: Sequence[Sequence[int]], probs: Sequence[Sequence[float]]) -> "CandidatePool":
        """One chain of tokens of each row, and the probability of each path."""
        rows = zip(chains, probs, strict=True)
        return cls.from_branches([Branches(chain, range(-1, len(chain) - 1), own) for chain, own in rows])

    @classmethod
    def merged(cls, pools: Sequence["CandidatePool"]) -> "CandidatePool":
        """The nodes of several pools of the same roots, on the host, in the order of their levels.

        Where pools share a node, the first one's stands for it with the best score, and the others have none left.
        """
        levels = torch.cat([pool.levels for pool in pools])
        order = levels.sort(stable=True).indices
        new_places = order.argsort().tolist()
        rows = []
        for row in range(len(pools[0].tokens)):
            own_tokens, above, own_scores = list[int](), list[int](), list[float]()
            known: dict[tuple[int, int], int] = {}
            for pool in pools:
                places: list[int] = []
                nodes = (part[row].tolist() for part in (pool.tokens, pool.parents, pool.scores))
                for token, parent, score in zip(*nodes, strict=True):
                    parent = -1 if parent < 0 else places[parent]
                    places.append(known.setdefault((parent, token), len(own_tokens)))
                    is_new = places[-1] == len(own_tokens)
                    if not is_new:
                        own_scores[places[-1]] = max(own_scores[places[-1]], score)
                    own_tokens.append(token)
                    above.append(-1 if parent < 0 else new_places[parent])
                    own_scores.append(score if is_new else -inf)
            rows.append((own_tokens, above, own_scores))
        tokens, parents, scores = (torch.tensor(part)[:, order] for part in zip(*rows, strict=True))
        return cls(tokens, parents, scores, levels[order])

    def with_an_end(self) -> "CandidatePool":
        """The pool with one node more, a child of the root that nothing speaks for: it stands for none."""
        tokens, parents, scores = (
            pad(part, (0, 1), value=value)
            for part, value in ((self.tokens, 0), (self.parents, -1), (self.scores, -inf))
        )
        return CandidatePool(tokens, parents, scores, pad(self.levels, (0, 1), value=1))

    def drafted_match(self, tokens: list[list[int]]) -> list[int]:
        """Count the tokens of each row, from the first of `[b, m]`, that were drafted as one path below the root."""
        rows = zip(self.tokens.tolist(), self.parents.tolist(), tokens, strict=True)
        return [len(followed(*row, -1)) for row in rows]

    def nodes_along(self, path: Tensor) -> Tensor:
        """Follow `path`, tokens `[b, m]`, from the root down: the nodes `[b, m]`, -1 after it has left the pool."""
        return self.nodes_of(path, torch.arange(-1, path.shape[1] - 1).expand(path.shape))

    def nodes_of(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Find the nodes of another tree, `[b, m]` with -1 for the root's children: the own ones, -1 for none."""
        nodes = tokens.new_full((len(tokens), tokens.shape[1] + 1), -1)  # the root last, as -1 finds it
        is_there = torch.zeros_like(nodes, dtype=torch.bool)
        is_there[:, -1] = True
        for place, (token, parent) in enumerate(zip(tokens.split(1, dim=1), parents.split(1, dim=1), strict=True)):
            parent = parent.to(nodes.device) % nodes.shape[1]
            hits = (self.tokens == token) & (self.parents == nodes.gather(1, parent)) & is_there.gather(1, parent)
            is_there[:, place] = hits.any(-1)
            nodes[:, place] = torch.where(is_there[:, place], hits.int().argmax(-1), -1)
        return nodes[:, :-1]

    def discounted(self, discounts: Sequence[float]) -> "CandidatePool":
        """With something added to the scores of each level, falling; deeper levels have the last."""
        if not discounts:
            return self
        of_levels = self.scores.new_tensor(discounts)[(self.levels - 1).clamp(max=len(discounts) - 1)]
        return replace(self, scores=self.scores + of_levels)

    def on_host(self) -> "CandidatePool":
        """The pool in the host's memory, in one read."""
        if self.tokens.device.type == "cpu":
            return self
        host = torch.device("cpu")
        tokens, parents, scores = moved([self.tokens, self.parents, self.scores], host)
        return CandidatePool(tokens, parents, scores, self.levels.to(host))


def followed(tokens: list[int], parents: list[int], path: list[int], root: int) -> list[int]:
    """The nodes of one row that carry the tokens of `path`, from a child of `root` down, as far as they are there.

    On lists: every step does this, and for its few nodes tensor operations would take longer.
    """
    node, nodes = root, []
    for token in path:
        child = next((i for i, own in enumerate(tokens) if own == token and parents[i] == node and i > node), None)
        if child is None:
            break
        nodes.append(child)
        node = child
    return nodes


@dataclass(frozen=True, slots=True)
class DraftTree:
    """The nodes of one target forward. Node 0 is the root: the newest token, which is not in the target's cache yet.

    Attributes:
        tokens: `[b, n]` target vocabulary ids.
        parents: `[b, n]` index of the parent, smaller than the node's own; the root is its own parent.
        depths: `[b, n]` distance to the root.
        ancestors: `[b, n, n]` bool; `[i, j]` says that j lies on the path from the root to i, i included.
        scores: `[b, n]` fp32 cumulative log probability, by the source that is surer; 0 for the root.
        level_count: levels below the root, at most: an upper bound that is known without reading a tensor.
        proposers: of each row, flags of who proposed each node, `DRAFTED`, `LOOKED_UP`, `REMEMBERED` or several of
            them; empty where it was the drafter.
        sizes: of each row, the nodes that count; the others, at its end, are never accepted. Empty where all count.
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
        """The nodes of each row that count."""
        return self.sizes or [self.node_count] * len(self.tokens)

    @classmethod
    def root_only(cls, root: Tensor) -> "DraftTree":
        """The tree of a plain step, from the newest tokens `[b]`."""
        tokens = root[:, None]
        zeros = torch.zeros_like(tokens)
        return cls(tokens, zeros, zeros, torch.ones_like(tokens, dtype=torch.bool)[..., None], zeros.float(), 0)

    @classmethod
    def from_parents(cls, tokens: Tensor, parents: Tensor, scores: Tensor | None = None) -> "DraftTree":
        """Build a tree from `[b, n]` tokens and parents; every parent comes before its children.

        Raises:
            ValueError: a parent does not come before its child.
        """
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
        """Build the tree of the root `[b]` and the best `total_tokens - 1` nodes of the pool.

        No kept node lacks its parent, even when scores tie: the sort is stable, and a parent comes before its children
        and never scores less.

        Args:
            root: the newest tokens.
            pool: on the root's device.
            total_tokens: nodes of the tree, root included; fewer where the pool has fewer.
            level_count: levels of the pool; `None` reads them from it, which code that is traced cannot.
            sizes: nodes of each row, root included, where some have fewer than `total_tokens`.

        Source: EAGLE-2 (arXiv 2406.16858) section 4.2, reranking.
        """
        kept = min(total_tokens - 1, pool.tokens.shape[1])
        if kept and level_count is None:
            level_count = int(pool.levels[-1])
        best = pool.scores.sort(dim=-1, descending=True, stable=True).indices[:, :kept]  # [b, n-1]
        if sizes:
            pool = pool.with_an_end()
            others = torch.arange(1, kept + 1) >= torch.tensor(sizes)[:, None]
            best = best.masked_fill(others, pool.tokens.shape[1] - 1)
        best = best.sort(dim=-1).values
        # A parent's node is its place among the kept ones, from 1 on; -1 comes before them all and finds the root.
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
        """Follow the parents: each squaring of the relation reaches twice as far."""
        seen = _itself(tokens, tokens.shape[1], torch.float32)
        seen.scatter_(2, parents[..., None], 1.0)
        for squaring in range((level_count - 1).bit_length() if level_count else 0):
            seen = seen @ seen  # counts ways, which are none or at least one
            if squaring > 3:
                seen = seen.clamp_(max=1.0)  # before they overflow
        ancestors = seen > 0
        return cls(tokens, parents, ancestors.sum(-1) - 1, ancestors, scores, level_count)

    def with_branches(self, rows: Sequence[Branches]) -> "DraftTree":
        """Add the nodes of another source to a tree on the host; a node that both have is one.

        Rows that gain fewer nodes are filled up with nodes that do not count.
        """
        own = zip(self.row_sizes, self.tokens.tolist(), self.parents.tolist(), self.scores.tolist(), rows, strict=True)
        found = [_Nodes(*(part[:size] for part in mine)).with_branches(more) for size, *mine, more in own]
        sizes = [len(row.tokens) for row in found]
        node_count = max(sizes)
        for row in found:
            row.fill_up(node_count)
        depths, ancestors = _lines([row.parents for row in found])
        # by way of NumPy, which reads lists three times as fast
        parts = [row.tokens for row in found], [row.parents for row in found], depths
        tokens, parents, distances = (torch.from_numpy(np.array(part, np.int64)) for part in parts)
        scores = torch.from_numpy(np.array([row.scores for row in found], np.float32))
        proposers = [row.proposers for row in found]
        sizes = [] if min(sizes) == node_count else sizes
        return DraftTree(tokens, parents, distances, ancestors, scores, max(map(max, depths)), proposers, sizes)

    def below(self, root: Tensor) -> "DraftTree":
        """The tree below the newest tokens `[b]`, on their device, in one copy; the tree's own root does not count."""
        if self.node_count == 1:
            return DraftTree.root_only(root)
        own = [self.tokens, self.parents, self.depths, self.scores, self.ancestors]
        tokens, parents, depths, scores, ancestors = moved(own, root.device)
        tokens[:, 0] = root
        return replace(self, tokens=tokens, parents=parents, depths=depths, ancestors=ancestors, scores=scores)

    def padded(self, node_count: int) -> "DraftTree":
        """Fill up to `node_count` nodes for the target's forward. Acceptance needs the tree without padding.

        A padding node stands at the root's position and sees only itself in the tree. No other node sees it.
        """
        missing = node_count - self.node_count
        if missing == 0:
            return self
        tokens, parents, depths = (pad(part, (0, missing)) for part in (self.tokens, self.parents, self.depths))
        ancestors = _itself(self.tokens, node_count, torch.bool)
        ancestors[:, : self.node_count, : self.node_count] = self.ancestors
        return DraftTree(tokens, parents, depths, ancestors, pad(self.scores, (0, missing)), self.level_count)

    def row(self, index: int) -> "DraftTree":
        """The tree of one row, as a batch of one: of its nodes that count."""
        own, nodes = slice(index, index + 1), slice(self.row_sizes[index])
        tokens, parents, depths, scores = (
            part[own, nodes] for part in (self.tokens, self.parents, self.depths, self.scores)
        )
        levels = min(self.level_count, self.row_sizes[index] - 1)
        return DraftTree(tokens, parents, depths, self.ancestors[own, nodes, nodes], scores, levels)

    def drafted_match(self, tokens: list[list[int]]) -> list[int]:
        """Count the tokens of each row, from the first of `[b, m]`, that were drafted as one path below the root."""
        rows = zip(self.row_sizes, self.tokens.tolist(), self.parents.tolist(), tokens, strict=True)
        return [len(followed(own[:size], parents, path, 0)) for size, own, parents, path in rows]

    def children(self) -> list[dict[tuple[int, int], int]]:
        """Map, for each row, (node, token) to the node's first child with that token."""
        return first_children(self.row_sizes, self.parents.tolist(), self.tokens.tolist())


def _itself(tokens: Tensor, node_count: int, dtype: torch.dtype) -> Tensor:
    """For each row of `tokens` a relation `[b, n, n]` of each node to itself alone."""
    itself = torch.eye(node_count, dtype=dtype, device=tokens.device)
    return itself.expand(len(tokens), -1, -1).contiguous()  # no copy of one row's


def _lines(rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
    """Depths of nodes, and their ancestors `[b, n, n]`: what `_derive` finds, faster for a few nodes on the host."""
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
    """See `DraftTree.children`; from `[b, n]` parents and tokens, of which `sizes` count in each row.

    Dicts, because acceptance looks up a few entries, one after the other.
    """
    return [  # the first child last
        {(above[node], own[node]): node for node in range(size - 1, 0, -1)}
        for size, above, own in zip(sizes, parents, tokens, strict=True)
    ]


# Flags of `DraftTree.proposers`: a head or another drafter, the text of the call, a memory of other texts
DRAFTED, LOOKED_UP, REMEMBERED = 1, 2, 4


class _Nodes:
    """The nodes of one row of a tree, as lists: for so few, tensor operations would take longer."""

    def __init__(self, tokens: list[int], parents: list[int], scores: list[float]) -> None:
        self.tokens, self.parents, self.scores = tokens, parents, scores
        self.proposers = [DRAFTED] * len(tokens)
        nodes = range(len(tokens) - 1, 0, -1)  # the first child last
        self._places = {(parents[node], tokens[node]): node for node in nodes}

    def with_branches(self, more: Branches) -> "_Nodes":
        """Add those that have a probability; of others, mark those that are there."""
        places: list[int] = []
        for token, parent, prob, flags in zip(
            *more[:3], more.proposers or [LOOKED_UP] * len(more.tokens), strict=True
        ):
            above = 0 if parent < 0 else places[parent]
            place = self._places.get((above, token), -1 if prob == 0.0 else len(self.tokens))
            places.append(place)
            if place == len(self.tokens):
                self._append(token, above, log(prob), flags)
                self._places[above, token] = place
            elif place > 0:
                self.scores[place] = max(self.scores[place], log(prob) if prob else -inf)
                self.proposers[place] |= flags
        return self

    def fill_up(self, node_count: int) -> None:
        for _ in range(node_count - len(self.tokens)):
            self._append(0, 0, -inf, 0)

    def _append(self, token: int, parent: int, score: float, proposers: int) -> None:
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(score)
        self.proposers.append(proposers)


def moved(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`parts` of one device and any shapes, those of wider elements first, on another device: in one copy, since each
    copy between host and device makes the host wait.
    """
    joined = torch.cat([part.flatten().view(torch.uint8) for part in parts])
    joined = joined.to(device, non_blocking=device.type != "cpu")  # whoever reads on the host has to wait
    blocks = joined.split([part.numel() * part.element_size() for part in parts])
    return [block.view(part.dtype).view(part.shape) for block, part in zip(blocks, parts, strict=True)]
