"""One shape for every step, as EAGLE-3 decodes."""

from typing import Any, Self

from torch import Tensor

from ..tree import TreeShape
from .protocol import Observation
from .saving import SavedPolicy, check_known


class FixedPolicy(SavedPolicy):
    """Always the same tree.

    Args:
        shape: for example `TreeShape(8, 3, 2)`, or a published one through `TreeShape.from_eagle(60, 7, 10)`.

    Raises:
        ValueError: it is no `TreeShape`.
    """

    policy_type = "fixed"
    reads_foreseen = False

    def __init__(self, shape: TreeShape) -> None:
        if not isinstance(shape, TreeShape):
            raise ValueError(
                f"Got the shape {shape!r}, but a fixed policy repeats a `TreeShape`. Pass "
                "`TreeShape(total_tokens, depth, top_k)`, for example `TreeShape(8, 3, 2)`."
            )
        self.shape = shape

    @property
    def needs_head(self) -> bool:
        """A shape of lookups alone serves a target without a head."""
        return self.shape.asks_head or self.shape.is_plain

    @property
    def looks_up(self) -> bool:
        return self.shape.lookup > 0

    def __repr__(self) -> str:
        return f"FixedPolicy({self.shape})"

    def choose(self, observation: Observation) -> TreeShape:
        return self.shape

    def to_config(self) -> dict[str, Any]:
        shape = self.shape
        return {"shape": [shape.total_tokens, shape.depth, shape.top_k, shape.lookup]}

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        check_known(cls.policy_type, config, ("shape",))
        return cls(TreeShape(*config["shape"]))
