"""The shapes that a learned policy picks from."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..tree import TreeShape


@dataclass(frozen=True, slots=True)
class ActionGrid:
    """A set of shapes, at least one; an action is an index into it."""

    shapes: tuple[TreeShape, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(self.shapes))  # a list would equal no grid that was saved
        if not all(isinstance(shape, TreeShape) for shape in self.shapes):
            raise ValueError(
                f"`ActionGrid` needs `TreeShape`s, got {self.shapes!r}. Use `ActionGrid.from_list` for lists of "
                "total_tokens, depth and top_k."
            )
        if not self.shapes or len(set(self.shapes)) < len(self.shapes):
            raise ValueError(
                f"`ActionGrid` needs at least one shape and no duplicates, got {len(self.shapes)} shapes, "
                f"{len(set(self.shapes))} of them distinct. Build it with "
                "`ActionGrid.from_bins(total_tokens, depths, top_ks)`."
            )

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, action: int) -> TreeShape:
        return self.shapes[action]

    @classmethod
    def paper(cls) -> "ActionGrid":
        """Return the 177 actions of Re-SpS (arXiv 2601.12212), section 4.1.

        The paper's filter drops 3 of 180, 80, 96 and 128 nodes at depth 3 and top_k 8, although they would fit.
        """
        return cls(
            tuple(
                TreeShape.from_eagle(total_token, depth, top_k)
                for total_token, depth, top_k in product((32, 48, 64, 80, 96, 128), range(3, 9), (8, 12, 16, 20, 32))
                if total_token <= top_k ** (depth - 1)
            )
        )

    @classmethod
    def small(cls) -> "ActionGrid":
        """Return the default: a plain step and trees of 4 to 16 nodes, for machines with expensive wide forwards."""
        return cls.from_bins((4, 6, 8, 12, 16), (2, 3, 4, 6), (1, 2, 4))

    @classmethod
    def from_bins(cls, total_tokens: Sequence[int], depths: Sequence[int], top_ks: Sequence[int]) -> "ActionGrid":
        """Combine the numbers to a plain step and all shapes that a head can fill without unused levels.

        Such a tree has a node per level, and at most the pool's `top_k + (depth - 1) * top_k ** 2` nodes.
        """
        shapes = [
            TreeShape(total, depth, top_k)
            for total, depth, top_k in product(total_tokens, depths, top_ks)
            if depth <= total - 1 <= top_k + (depth - 1) * top_k**2
        ]
        return cls(tuple(dict.fromkeys([TreeShape.plain(), *shapes])))

    def with_lookups(self, lookups: Sequence[int]) -> "ActionGrid":
        return ActionGrid(tuple(replace(shape, lookup=lookup) for shape, lookup in product(self.shapes, lookups)))

    def within(self, levels: int) -> "ActionGrid":
        return ActionGrid(tuple(shape for shape in self.shapes if shape.depth <= levels))

    def affordable(self, seconds: Callable[[TreeShape], float]) -> "ActionGrid":
        """Keep the shapes whose step, with all drafts accepted, beats as many plain ones."""
        plain = seconds(TreeShape.plain())
        most_emitted = {shape: 1 + max(shape.depth * shape.asks_head, shape.lookup) for shape in self.shapes}
        kept = [shape for shape, most in most_emitted.items() if shape.is_plain or seconds(shape) < most * plain]
        return ActionGrid(tuple(dict.fromkeys([TreeShape.plain(), *kept])))

    def to_list(self) -> list[list[int]]:
        """List total_tokens, depth, top_k and lookup of each shape, for JSON."""
        return [[shape.total_tokens, shape.depth, shape.top_k, shape.lookup] for shape in self.shapes]

    @classmethod
    def from_list(cls, rows: Iterable[Sequence[int]]) -> "ActionGrid":
        return cls(tuple(TreeShape(*row) for row in rows))
