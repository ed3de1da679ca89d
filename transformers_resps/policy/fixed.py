"""One shape for every step, as EAGLE-3 decodes."""

from ..tree import TreeShape
from .protocol import Observation, Policy


class FixedPolicy(Policy):
    """Always the same tree.

    Args:
        shape: for example `TreeShape(8, 3, 2)`, or a published one through `TreeShape.from_eagle(60, 7, 10)`.
    """

    def __init__(self, shape: TreeShape) -> None:
        self.shape = shape

    def __repr__(self) -> str:
        return f"FixedPolicy({self.shape})"

    def choose(self, observation: Observation) -> TreeShape:
        return self.shape
