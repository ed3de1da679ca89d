"""The one interface between the step loop and all that drafts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..policies.base import Policy
from ..tree import CandidatePool, DraftTree, TreeShape


class Drafter(ABC):
    """Drafts candidate pools for the rows of one call, from the tokens that were committed.

    Attributes:
        proposable_tokens: how many tokens it can propose after a node.
        most_levels: how many levels it can draft; `None` for any number.
        built_tree: of all nodes that the newest draft was asked for; `None` where it gave the pool alone.
    """

    proposable_tokens: int
    most_levels: int | None = None
    built_tree: DraftTree | None = None

    @abstractmethod
    def observe(
        self, tokens: Tensor, features: Tensor | None = None, rows: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Take in newly committed tokens, at first the prompt's and the target's pick after it.

        Args:
            tokens: `[b, t]`. A row that gained fewer repeats its last.
            features: `[b, t, F]` of the position before each token, of the prompt one less; `None` where no drafter
                reads features.
            rows: the tokens that each row gained, on the host; `None` where all rows gained t.
        """

    @abstractmethod
    def draft(self, shape: TreeShape, policy: Policy) -> CandidatePool:
        """Draft candidates below the newest token.

        Args:
            shape: up to `depth` levels, at least one, of `top_k` children per node.
            policy: asked after every level whether to go on.
        """

    def read(self, at_least: int = 1) -> None:
        """Process what was observed, if at least so many tokens wait; `draft` does so by itself."""
        return None

    def take_compile_seconds(self) -> float:
        """Seconds of compiling drafts since they were last taken."""
        return 0.0

    @abstractmethod
    def keep_rows(self, rows: list[int]) -> None:
        """Draft for these rows only, from now on."""
