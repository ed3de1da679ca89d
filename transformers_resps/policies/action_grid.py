"""The set of tree shapes from which a learned policy picks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..tree import TreeShape


@dataclass(frozen=True, slots=True)
class ActionGrid:
    """One or more tree shapes, without duplicates. An action of a learned policy is an index into `shapes`."""

    shapes: tuple[TreeShape, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(self.shapes))  # for `==`: a list never equals a tuple
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
        """Return the 177 tree shapes of Re-SpS (arXiv 2601.12212), section 4.1.

        The paper's filter drops three of 180 shapes (depth 3, top_k 8, 80 or more nodes), which a head could fill.
        """
        sizes = product((32, 48, 64, 80, 96, 128), range(3, 9), (8, 12, 16, 20, 32))  # total_token, depth, top_k
        return cls(tuple(TreeShape.from_eagle(n, depth, k) for n, depth, k in sizes if n <= k ** (depth - 1)))

    @classmethod
    def small(cls) -> "ActionGrid":
        """Return the default grid for machines where wide forwards are expensive: no draft, or 4 to 16 nodes."""
        return cls.from_bins((4, 6, 8, 12, 16), (2, 3, 4, 6), (1, 2, 4))

    @classmethod
    def from_bins(cls, total_tokens: Sequence[int], depths: Sequence[int], top_ks: Sequence[int]) -> "ActionGrid":
        """Make a shape of every combination of the numbers, keep the possible shapes, and add a plain step.

        A shape is possible if it has at least one node per level, and, without the root, at most as many nodes as the
        head proposes: `top_k + (depth - 1) * top_k ** 2`.
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
        """Return the grid of shapes that beat plain steps if all drafts are accepted; `seconds` is a step's time."""
        plain = seconds(TreeShape.plain())
        most_emitted = {shape: 1 + max(shape.depth * shape.asks_head, shape.lookup) for shape in self.shapes}
        kept = [shape for shape, most in most_emitted.items() if shape.is_plain or seconds(shape) < most * plain]
        return ActionGrid(tuple(dict.fromkeys([TreeShape.plain(), *kept])))

    def to_list(self) -> list[list[int]]:
        """Return `[total_tokens, depth, top_k, lookup]` for each shape, for JSON."""
        return [[shape.total_tokens, shape.depth, shape.top_k, shape.lookup] for shape in self.shapes]

    @classmethod
    def from_list(cls, rows: Iterable[Sequence[int]]) -> "ActionGrid":
        return cls(tuple(TreeShape(*row) for row in rows))
