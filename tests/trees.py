"""Random trees and pools as Hypothesis strategies, and brute force on lists of parents."""

import torch
from hypothesis import strategies as st

from transformers_resps.tree import CandidatePool, DraftTree


VOCABULARY = 4  # so few that siblings and cousins share tokens


@st.composite
def parents(draw: st.DrawFn, most_nodes: int = 14) -> list[int]:
    """Chains, stars, one node, and anything between; each parent before its children, the root its own parent."""
    count = draw(st.integers(1, most_nodes))
    kind = draw(st.sampled_from(["any", "chain", "star", "caterpillar"]))
    if kind == "chain":
        return [0, *range(count - 1)]
    if kind == "star":
        return [0] * count
    if kind == "caterpillar":
        return [0] + [max(node - 1 - node % 2, 0) for node in range(1, count)]
    return [0] + [draw(st.integers(0, node - 1)) for node in range(1, count)]


@st.composite
def trees(draw: st.DrawFn, most_nodes: int = 14) -> DraftTree:
    """One row; tokens repeat below different parents and below the same one."""
    row = draw(parents(most_nodes))
    tokens = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=len(row), max_size=len(row)))
    return DraftTree.from_parents(torch.tensor([tokens]), torch.tensor([row]))


@st.composite
def batches(draw: st.DrawFn, most_nodes: int = 6, rows: int | None = None) -> DraftTree:
    """Trees of two or three rows, or of as many as given, cut to one number of nodes."""
    count = rows or draw(st.integers(2, 3))
    alone = draw(st.lists(trees(most_nodes), min_size=count, max_size=count))
    node_count = min(tree.node_count for tree in alone)
    tokens, above = (
        torch.cat([part[:, :node_count] for part in parts])
        for parts in ([tree.tokens for tree in alone], [tree.parents for tree in alone])
    )
    return DraftTree.from_parents(tokens, above)


@st.composite
def pools(draw: st.DrawFn, rows: int = 2) -> CandidatePool:
    """As drafters make them, level by level: scores never above the parent's, and so coarse that they tie often."""
    levels: list[int] = []
    tokens, above, scores = ([[] for _ in range(rows)] for _ in range(3))
    frontiers = [[(-1, 0.0)] for _ in range(rows)]
    for level in range(1, draw(st.integers(1, 4)) + 1):
        nodes = range(len(levels), len(levels) + draw(st.integers(1, 6)))
        for row in range(rows):
            drafted = [draw(st.sampled_from(frontiers[row])) for _ in nodes]
            above[row] += [parent for parent, _ in drafted]
            scores[row] += [score - draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])) for _, score in drafted]
            tokens[row] += [draw(st.integers(0, VOCABULARY - 1)) for _ in nodes]
            frontiers[row] = [(node, scores[row][node]) for node in nodes]
        levels += [level] * len(nodes)
    return CandidatePool(*map(torch.tensor, (tokens, above, scores, levels)))


def random_tokens(rows: int, count: int) -> st.SearchStrategy[list[list[int]]]:
    """`[rows, count]` tokens."""
    row = st.lists(st.integers(0, VOCABULARY - 1), min_size=count, max_size=count)
    return st.lists(row, min_size=rows, max_size=rows)


def path_of(row: list[int], node: int) -> list[int]:
    """From the root to `node`."""
    path = [node]
    while path[-1] != 0:
        path.append(row[path[-1]])
    return path[::-1]


def texts_of(tree: DraftTree, row: int = 0) -> set[tuple[int, ...]]:
    """What can be read along the tree, the root left out."""
    above, tokens = tree.parents[row].tolist(), tree.tokens[row].tolist()
    return {tuple(tokens[node] for node in path_of(above, place)[1:]) for place in range(len(tokens))}
