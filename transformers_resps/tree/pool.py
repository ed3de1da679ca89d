"""The pool of candidates that a drafter scores."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .transfer import moved


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

    def drafted_match(self, tokens: list[list[int]]) -> list[int]:
        """Count the tokens of each row, from the first of `[b, m]`, that were drafted as one path below the root."""
        rows = zip(self.tokens.tolist(), self.parents.tolist(), tokens, strict=True)
        return [len(followed(*row, -1)) for row in rows]

    def nodes_along(self, path: Tensor) -> Tensor:
        """Follow `path`, tokens `[b, m]`, from the root down: the nodes `[b, m]`, -1 after it has left the pool."""
        node, nodes = torch.full_like(path[:, :1], -1), []
        inside = torch.ones_like(node, dtype=torch.bool)
        for tokens in path.split(1, dim=1):
            hits = (self.tokens == tokens) & (self.parents == node) & inside
            inside, node = hits.any(-1, keepdim=True), hits.int().argmax(-1, keepdim=True)
            nodes.append(torch.where(inside, node, -1))
        return torch.cat(nodes, dim=1)

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
