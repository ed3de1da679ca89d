"""The shape that a policy asks for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The size of a draft tree, which a policy chooses for each step.

    Args:
        total_tokens: number of nodes that the target verifies, root included; at least 1.
        depth: number of levels that the head drafts. A step accepts at most one token of each; at least 0.
        top_k: number of children of a node, and of nodes of a level that get children; at least 1.
        lookup: maximum number of further nodes from prompt lookup, on top of `total_tokens`; at least 0.

    `TreeShape(1, 0, 1)` is a plain step, `TreeShape(n + 1, n, 1)` a chain of n drafted tokens, and
    `TreeShape(1, 0, 1, lookup=8)` uses prompt lookup without a head.

    Raises:
        ValueError: a size is below its minimum, or is not an integer.
    """

    total_tokens: int
    depth: int
    top_k: int
    lookup: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("total_tokens", 1), ("depth", 0), ("top_k", 1), ("lookup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(
                    f"TreeShape got `{name}={value!r}`, but it must be an integer of at least {minimum}. "
                    "`TreeShape(1, 0, 1)` is a plain step, without drafting."
                )

    @classmethod
    def from_eagle(cls, total_token: int, depth: int, top_k: int) -> "TreeShape":
        """Convert the shape that EAGLE and Re-SpS write as total_token/depth/top_k; they count one level less.

        Their 60/7/10 drafts 8 levels (`topK_genrate` in SafeAILab/EAGLE: one extend pass and `depth` loops).
        """
        return cls(total_token, depth + 1, top_k)

    @classmethod
    def plain(cls) -> "TreeShape":
        """The shape of a plain step: nothing is drafted, and the target decodes one token."""
        return cls(1, 0, 1)

    def __str__(self) -> str:
        """`8/4/2` for total_tokens/depth/top_k, `8/4/2+6` with lookup nodes, `+6` for those alone, or `plain`."""
        if self.is_plain:
            return "plain"
        head = f"{self.total_tokens}/{self.depth}/{self.top_k}" if self.asks_head else ""
        return f"{head}+{self.lookup}" if self.lookup else head

    @property
    def asks_head(self) -> bool:
        """Whether the head drafts."""
        return self.total_tokens > 1 and self.depth > 0

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return not self.asks_head and self.lookup == 0

    def within(self, depth: int) -> "TreeShape":
        """The same shape with at most `depth` levels."""
        if depth >= self.depth and depth >= self.lookup:
            return self
        depth = max(depth, 0)
        return TreeShape(self.total_tokens, min(self.depth, depth), self.top_k, min(self.lookup, depth))
