"""Random pools and trees as strategies, and brute force on lists of parents."""

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
def pools(draw: st.DrawFn) -> CandidatePool:
    """As drafters make them, level by level: scores never above the parent's, and so coarse that they tie often."""
    tokens, above, scores, levels = [], [], [], []
    frontier = [(-1, 0.0)]
    for level in range(1, draw(st.integers(1, 4)) + 1):
        following = []
        for _ in range(draw(st.integers(1, 6))):
            parent, score = draw(st.sampled_from(frontier))
            score = score - draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))
            following.append((len(tokens), score))
            tokens.append(draw(st.integers(0, VOCABULARY - 1)))
            above.append(parent)
            scores.append(score)
            levels.append(level)
        frontier = following
    return CandidatePool(torch.tensor([tokens]), torch.tensor([above]), torch.tensor([scores]), torch.tensor(levels))


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
