"""All paths of a tree as a batch of sequences, for layers that read tokens one after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tree import DraftTree


@dataclass(frozen=True, slots=True)
class TreePaths:
    """The paths from the root to every leaf, p of them for each row; a row with fewer repeats its last.

    Attributes:
        nodes: `[b * p, d]` nodes of each path, counted through all rows; a short path repeats its last node.
        places: `[b, n]` where each node stands in the flattened paths.
        rows: `[b * p]` the row of each path.
        leaves: of each row, leaf -> its path, from 0 on.
    """

    nodes: Tensor
    places: Tensor
    rows: Tensor
    leaves: list[dict[int, int]]

    @classmethod
    def of(cls, tree: DraftTree) -> "TreePaths":
        """Reads the parents, which waits for an accelerator once."""
        rows = [_paths(parents) for parents in tree.parents.tolist()]
        count, depth = max(map(len, rows)), max(len(path) for paths in rows for path in paths)
        leaves = [{path[-1]: index for index, path in enumerate(paths)} for paths in rows]
        order = torch.arange(len(rows), device=tree.parents.device)
        if count == 1:  # chains: nothing moves
            in_order = torch.arange(tree.parents.numel(), device=order.device).view_as(tree.parents)
            return cls(in_order, in_order, order, leaves)
        nodes, places = list[int](), list[int]()
        for row, paths in enumerate(rows):
            where: dict[int, int] = {}
            for index, path in enumerate(paths, start=row * count):
                for column, node in enumerate(path):
                    where.setdefault(node, index * depth + column)
            places += [where[node] for node in range(tree.node_count)]
            for path in paths + paths[-1:] * (count - len(paths)):
                nodes += [row * tree.node_count + node for node in path + path[-1:] * (depth - len(path))]
        numbers = torch.tensor(nodes + places, device=order.device)  # one copy
        along, at = numbers.split([len(nodes), len(places)])
        return cls(along.view(-1, depth), at.view(len(rows), -1), order.repeat_interleave(count), leaves)

    @property
    def path_count(self) -> int:
        """Paths of each row."""
        return len(self.nodes) // len(self.places)

    @property
    def depth(self) -> int:
        """Nodes of the longest path."""
        return self.nodes.shape[1]

    def along(self, states: Tensor) -> Tensor:
        """The states `[b, n, h]` of all nodes along the paths: `[b * p, d, h]`."""
        return states if self.path_count == 1 else gathered(states, self.nodes)

    def at_nodes(self, states: Tensor) -> Tensor:
        """The states `[b * p, d, h]` of all paths at the nodes: `[b, n, h]`; a node on several is the same in all."""
        return states if self.path_count == 1 else gathered(states, self.places)

    def full_path(self, row: int, nodes: list[int]) -> int | None:
        """The path of all rows that consists of these nodes and was read without repetitions, if there is one."""
        found = self.leaves[row].get(nodes[-1]) if len(nodes) == self.depth else None
        return None if found is None else row * self.path_count + found


def gathered(states: Tensor, order: Tensor) -> Tensor:
    """Of states `[any, any, h]` those at `order` `[a, b]` in the flattened first two dimensions: `[a, b, h]`."""
    found = states.flatten(0, 1).index_select(0, order.flatten().to(states.device))
    return found.view(*order.shape, states.shape[-1])


def _paths(parents: list[int]) -> list[list[int]]:
    """The nodes from the root to each leaf."""
    paths = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        paths.append([*paths[parent], node])
    inner = set(parents[1:])
    return [path for node, path in enumerate(paths) if node not in inner]
