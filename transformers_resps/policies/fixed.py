"""A policy that drafts a tree of the same shape at every step, as EAGLE-3 does."""

from typing import Any, Self

from torch import Tensor

from ..tree import TreeShape
from .base import Observation
from .saving import SavedPolicy, check_known


class FixedPolicy(SavedPolicy):
    """Drafts a tree of the same shape at every step.

    Args:
        shape: shape of all trees, as `TreeShape(8, 3, 2)` or, with EAGLE's numbers, `TreeShape.from_eagle(60, 7, 10)`.
    """

    policy_type = "fixed"
    grows = False
    needs_drafted_match = False

    def __init__(self, shape: TreeShape) -> None:
        if not isinstance(shape, TreeShape):
            raise ValueError(
                f"`FixedPolicy` needs a `TreeShape`, got {shape!r}. Pass `TreeShape(total_tokens, depth, top_k)`, for "
                "example `TreeShape(8, 3, 2)`."
            )
        self.shape = shape
        self.needs_head = shape.asks_head
        self.uses_lookup = shape.lookup > 0

    def __repr__(self) -> str:
        return f"FixedPolicy({self.shape})"

    def wants_head(self, rows: int, tokens: int, room: int) -> bool:
        return self.needs_head

    def choose(self, observation: Observation) -> TreeShape:
        return self.shape

    def to_config(self) -> dict[str, Any]:
        shape = self.shape
        return {"shape": [shape.total_tokens, shape.depth, shape.top_k, shape.lookup]}

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        check_known(cls.policy_type, config, ("shape",))
        return cls(TreeShape(*config["shape"]))
