"""The target's picks as the host walks along them: all of a tree at once from an accelerator, one by one on a CPU."""

import torch
from torch import Tensor

from ..tree import DraftTree, first_children
from .tree_picks import TreePicks


class Picks:
    """What the target picks at the nodes of a tree, and where they lead.

    Args:
        children: see `DraftTree.children`.
        rows: of each row the pick at every node; `None` to ask `logits` when a node is come to: on a CPU a read is
            free, and nodes off the path would only cost.
        logits: `[b, n, v]`.
        tokens: `[b, n]` the picks where they were made; `None` on a CPU.
        processed: where scores were processed before, what a text needs to commit the picks.
    """

    def __init__(
        self,
        children: list[dict[tuple[int, int], int]],
        rows: list[list[int]] | None,
        logits: Tensor,
        tokens: Tensor | None = None,
        processed: TreePicks | None = None,
    ) -> None:
        self.children, self.tokens, self.processed, self.device = children, tokens, processed, logits.device
        self._rows, self._logits = rows, logits

    @classmethod
    def asked(cls, tree: DraftTree, logits: Tensor) -> "Picks":
        """Of the largest logits, each when it is asked for."""
        return cls(tree.children(), None, logits)

    @classmethod
    def read(cls, tree: DraftTree, logits: Tensor, processed: TreePicks | None = None) -> "Picks":
        """Those of the largest logits, or those `processed`, with the tree, in one read that waits for the target."""
        tokens = logits[:, : tree.node_count].argmax(-1) if processed is None else processed.tokens[None]
        if tree.node_count == 1:
            return cls([{} for _ in tokens], tokens.tolist(), logits, tokens, processed)
        parents, drafted = (part.to(tokens.device) for part in (tree.parents, tree.tokens))
        parents, drafted, rows = torch.stack([parents, drafted, tokens]).tolist()
        return cls(first_children(parents, drafted), rows, logits, tokens, processed)

    def at(self, rows: list[int], nodes: list[int]) -> list[int]:
        """The pick at one node in each of these rows."""
        if self._rows is not None:
            return [self._rows[row][node] for row, node in zip(rows, nodes, strict=True)]
        found: list[int] = logits_at(rows, nodes, self._logits).argmax(-1).tolist()
        return found


def logits_at(rows: list[int], nodes: list[int], logits: Tensor) -> Tensor:
    """`[r, v]` of one node in each of r rows, of `[b, n, v]`; no copy where all rows stand at one node."""
    if len(rows) == len(logits) and len(set(nodes)) == 1:
        return logits[:, nodes[0]]
    return logits[rows, nodes]
