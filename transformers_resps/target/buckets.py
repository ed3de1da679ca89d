"""Few sizes for a tree's forward: with a static cache trees are padded, so that a compiled target sees few shapes."""

from ..tree import DraftTree


class Buckets:
    """Powers of two, which trees are padded to.

    Args:
        slots: of the static cache; `None` for a cache that grows, where trees stay as they are.
    """

    def __init__(self, slots: int | None) -> None:
        self.slots = slots

    def rows(self, tree: DraftTree) -> int:
        """Rows of the forward over `tree`: its nodes and padding."""
        return tree.node_count if self.slots is None else 1 << (tree.node_count - 1).bit_length()

    def padded(self, tree: DraftTree) -> DraftTree:
        """What the target's forward gets."""
        return tree.padded(self.rows(tree))

    def fitted(self, tree: DraftTree, filled: int) -> DraftTree:
        """The first nodes, as many as fit with their padding after `filled` slots; at least one slot must be left."""
        if self.slots is None or self.rows(tree) <= self.slots - filled:
            return tree
        return tree.first(1 << (self.slots - filled).bit_length() - 1)
