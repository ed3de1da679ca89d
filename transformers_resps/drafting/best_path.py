"""The chain that a pool holds for loops which verify no trees."""

from torch import Tensor

from ..tree import CandidatePool


def best_path(pool: CandidatePool) -> Tensor:
    """Tokens `[1, m]` of the path below the root of which the most are expected to be accepted, in a pool of one row.

    Of a path as many are expected as its nodes' probabilities sum up to.
    """
    parents, probs = pool.parents[0].tolist(), pool.scores[0].exp().tolist()
    expected: list[float] = []
    for parent, prob in zip(parents, probs, strict=True):
        expected.append(prob + (expected[parent] if parent >= 0 else 0.0))
    node, path = max(range(len(expected)), key=expected.__getitem__), list[int]()
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return pool.tokens[:, path]
