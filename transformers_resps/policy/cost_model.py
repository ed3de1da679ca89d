"""What a step costs, by its size and context: the interface of tables, measured or planted."""

from abc import ABC, abstractmethod

from ..tree import TreeShape


class CostModel(ABC):
    """Seconds of the parts of a step.

    Attributes:
        overhead: seconds of a step outside its forwards: acceptance, caches, policy.
    """

    overhead: float

    @abstractmethod
    def verify_seconds(self, nodes: int, context: int) -> float:
        """Seconds of a target forward over `nodes`, after `context` positions."""

    @abstractmethod
    def draft_seconds(self, width: int, levels: int) -> float:
        """Seconds of drafting `levels` levels of `width` nodes."""

    def step_seconds(self, shape: TreeShape, context: int) -> float:
        """Seconds of a whole step: drafting, the target's forward over all nodes, and the overhead."""
        verify = self.verify_seconds(shape.total_tokens + shape.lookup, context)
        return self.draft_seconds(shape.top_k, shape.depth) + verify + self.overhead
