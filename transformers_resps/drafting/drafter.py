"""The one interface between the step loop and all that drafts."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..policies.base import Policy
from ..tree import CandidatePool, DraftTree, TreeShape


class Drafter(ABC):
    """Drafts candidate pools for the rows of one call, from the positions that were committed.

    Attributes:
        newest_features: `[b, F]` the target's features at the newest position that it has processed.
        proposable_tokens: how many tokens it can propose after a node.
        built_tree: of all nodes that the newest draft was asked for; `None` where it gave the pool alone.
    """

    newest_features: Tensor
    proposable_tokens: int
    built_tree: DraftTree | None = None

    @abstractmethod
    def observe(self, features: Tensor, tokens: Tensor, counts: list[int] | None = None) -> None:
        """Take in newly committed positions.

        Args:
            features: `[b, t, F]` of the positions.
            tokens: `[b, t]` the token after each of them.
            counts: how many of them are each row's, the rest repeating its last; `None` for all.
        """

    @abstractmethod
    def draft(self, shape: TreeShape, policy: Policy) -> CandidatePool:
        """Draft candidates below the newest token.

        Args:
            shape: up to `depth` levels, at least one, of `top_k` children per node.
            policy: asked after every level whether to go on.
        """

    def read(self, at_least: int = 1) -> None:
        """Process what was observed, if at least so many positions wait; `draft` does so by itself."""
        return None

    def take_compile_seconds(self) -> float:
        """Seconds of compiling drafts since they were last taken."""
        return 0.0

    def keep_rows(self, rows: list[int]) -> None:
        """Draft for these rows only, from now on."""
        raise NotImplementedError(f"{type(self).__name__} drafts for one row.")
