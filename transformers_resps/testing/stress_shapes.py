"""Built-in trees, beside those of the policy in question, which may never draft some kinds of trees."""

from itertools import cycle

from ..policy import Observation, Policy
from ..tree import TreeShape


# Wide, deep, looked up, a chain, plain: masks, positions, caches and acceptance differ in each of them.
_SHAPES = (
    TreeShape(24, 5, 4, lookup=4),
    TreeShape.plain(),
    TreeShape(1, 0, 1, lookup=6),
    TreeShape(6, 5, 1),
    TreeShape(9, 2, 8),
    TreeShape(1, 0, 1, lookup=2),
    TreeShape(16, 3, 3),
)


class ChangingTrees(Policy):
    """Another shape at every step.

    Args:
        has_head: false leaves out the shapes that need a head.
    """

    needs_head = False

    def __init__(self, has_head: bool) -> None:
        self._shapes = cycle([shape for shape in _SHAPES if has_head or not shape.asks_head])

    def __repr__(self) -> str:
        return "ChangingTrees()"

    def choose(self, observation: Observation) -> TreeShape:
        return next(self._shapes)
