"""Track which slots (positions in the static cache buffers) hold each batch row's text and newest tree."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from ...tree import DraftTree, moved
from ..rows import RowEnds, SlotMap
from .buffers import SlotBuffers, filled, give_back, parts_of


Row = TypeVar("Row")
Count = TypeVar("Count", int, Tensor)
Window = Callable[[int], int]


WINDOW = 128  # A forward attends over a multiple of this number of slots.
# Extra slots, so that a buffer is always longer than the part that a forward attends over: code compiled for equal
# sizes assumes that they stay equal.
SPARE = 16


def windowed(count: int) -> int:
    """Round a number of slots up to a multiple of `WINDOW`, so that forwards have few sizes."""
    return rounded_up(count, WINDOW)


class SlotTexts:
    """The texts of a batch in static cache buffers: token i of a text has slot i; a tree's nodes have the next slots.

    `pattern` is a cache that shows the shapes of the target's keys and values. With `has_padding` the prompt's padding
    has slots, too; else every text begins at slot 0. The function `window` rounds up the number of slots over which a
    forward attends. The buffers have `count` rows (0 before `begin`): the batch, then copies of its last row.
    """

    roots: Tensor  # [count, 1], slots of the newest tree's roots

    def __init__(
        self, rows: RowEnds, buffers: SlotBuffers, pattern: Cache, has_padding: bool = True, window: Window = windowed
    ) -> None:
        self.rows, self.buffers, self.pattern, self.count = rows, buffers, pattern, 0
        self._has_padding, self._window = has_padding, window
        self._hidden: list[int] = []  # for each row, how many positions of its prompt have no slots
        self._seen: dict[int, Tensor] = {}  # size -> the result of `visible`
        self._numbers = torch.empty(0, dtype=torch.long, device=rows.device)

    def begin(self, cache: Cache) -> None:
        """Reserve buffers for the prompt, and copy the keys and values in `cache` to the buffers."""
        end, length = self.rows.prompt_length, self.rows.length
        self.count, self._hidden = len(self.rows), [end - len(order) for order in self.orders(end)]
        self.buffers.reserve(parts_of(self.pattern), self.count, windowed(end + WINDOW) + SPARE)
        if length:
            self.buffers.fill(parts_of(cache), length, self.orders(length))

    @property
    def places(self) -> list[int]:
        """Number of filled slots of each row, which is also the slot of the next tree's root."""
        return [end - hidden for end, hidden in zip(self.rows.ends, self._hidden, strict=True)]

    def orders(self, length: int) -> list[Tensor]:
        """Return, for each row, the positions below `length` that have slots, in the order of their slots."""
        if self._has_padding:
            return [torch.arange(length)] * len(self.rows)
        seen = self.rows.slots.unpadded(length, len(self.rows), torch.device("cpu"))
        return [row.nonzero().flatten() for row in seen]

    def visible(self, size: int) -> Tensor:
        """Return a bool mask `[count, size]` of each row's first slots, false where a slot holds padding."""
        if size not in self._seen:
            slots = self.rows.slots if self._has_padding else SlotMap(None)
            self._seen[size] = slots.unpadded(size, self.count, self.rows.device)
        return self._seen[size]

    def reserve(self, count: int) -> int:
        """Grow the buffers to at least `count` slots if needed; return how many slots the forward attends over."""
        size = self._window(count)
        if size > self.buffers.size:
            self.buffers.grow(2 * size + SPARE)
        return size

    def first(self, count: int) -> Tensor:
        """Return `torch.arange(count)` without launching a kernel in each step."""
        if len(self._numbers) < count:
            self._numbers = torch.arange(windowed(count), device=self.rows.device)
        return self._numbers[:count]

    def nodes(self, tree: DraftTree, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens, depths, ancestors and roots of `tree`, padded to the buffers' rows and `count` nodes.

        The roots `[rows, 1 + planes]` hold each root's slot, then its position ids (several in M-RoPE).
        """
        own = [[place, *planes] for place, planes in zip(self.places, self.rows.roots, strict=True)]
        roots = torch.tensor(filled_up(own, self.count))
        if self.rows.device.type != "cpu":
            (roots,) = moved([roots], self.rows.device)
        padded = tree.padded(count)
        tokens, depths, ancestors = (
            with_rows(part, self.count) for part in (padded.tokens, padded.depths, padded.ancestors)
        )
        self.roots = roots[:, :1].long()
        return tokens, depths, ancestors, roots

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        """Append the accepted nodes to the texts, without waiting for the device; see `Verifier.keep`."""
        if any(nodes[-1] >= len(nodes) for nodes in paths):  # else all are in place
            ranks = pad((path[:, 1:] != path[:, :-1]).cumsum(dim=1), (1, 0))
            self.buffers.move(self.roots + path, self.roots + ranks)
        self.rows.slots.extend(list(map(len, paths)))

    def keep_rows(self, rows: list[int]) -> list[int]:
        """Keep only `rows`; return the rows that the buffers hold now: `rows`, then copies of the last one."""
        self.rows.keep_rows(rows)
        self._hidden = [self._hidden[row] for row in rows]
        # a single row would need other code on a CPU; elsewhere any other number of rows needs another graph
        kept = filled_up(rows, min(self.count, 2) if self.rows.device.type == "cpu" else self.count)
        self.count, self._seen = len(kept), {}
        self.buffers.keep_rows(kept, self.rows.length)
        return kept

    def give_back(self, cache: Cache, rows: slice, length: int) -> None:
        """Copy keys and values of `rows` at the first `length` positions, padding included, to the dynamic `cache`."""
        positions = torch.arange(length)
        orders = self.orders(length)[rows]
        slots = torch.stack([torch.searchsorted(order, positions, right=True) for order in orders]) - 1
        give_back(self.buffers.entries(slots.clamp(min=0), rows.start), cache, filled(self.pattern), length)


def filled_up(rows: list[Row], count: int) -> list[Row]:
    """Repeat the last item of `rows` until there are `count` items."""
    return rows + rows[-1:] * (count - len(rows))


def with_rows(part: Tensor, count: int) -> Tensor:
    """Repeat the last row of `part`: `[b, ...]` -> `[count, ...]`."""
    missing = count - len(part)
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part


def rounded_up(count: Count, step: int) -> Count:
    """Round `count` up to a multiple of `step`."""
    return -(-count // step) * step
