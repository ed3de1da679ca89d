"""Which slot holds which position of which row: plain numbers on the host, as one table for a forward."""

from collections.abc import Sequence

import torch
from torch import Tensor


HIDDEN = -1  # place of a slot that no node may see


class SlotTable:
    """The slots of a batch.

    Args:
        seen: of each row, whether its entries may be seen; padding may not. Entry i lies in slot i.

    Attributes:
        rows: of each row, the slots of its entries in the order of the text.
    """

    def __init__(self, seen: list[list[bool]]) -> None:
        self.rows = [list(range(len(row))) for row in seen]
        self._ends = [len(row) for row in seen]  # slots from there on were never used
        self._free: list[list[int]] = [[] for _ in seen]  # before that
        self._offered: list[list[int]] = []
        self._places = torch.full((len(seen), 2 * max(self._ends)), HIDDEN)  # [b, slots]
        for table, row in zip(self._places, seen, strict=True):
            table[: len(row)] = torch.where(torch.tensor(row), torch.arange(len(row)), HIDDEN)

    @property
    def lengths(self) -> list[int]:
        """Entries of each row, which is the place of its next one."""
        return [len(row) for row in self.rows]

    @property
    def size(self) -> int:
        """Slots that were used or are offered."""
        return max([*self._ends, *(slots[-1] + 1 for slots in self._offered)])

    def offer(self, count: int) -> list[list[int]]:
        """The slots for the nodes of the coming forward, `count` of each row, ascending.

        `keep` or another `offer` comes next.
        """
        self._offered = []
        for free, end in zip(self._free, self._ends, strict=True):
            missing = max(count - len(free), 0)
            self._offered.append([*free[:count], *range(end, end + missing)])
        self._reserve(self.size)
        return self._offered

    def places(self, size: int) -> Tensor:
        """`[b, size]` the place in its row's text of the entry in each slot; `HIDDEN` where none may be seen."""
        self._reserve(size)
        return self._places[:, :size].contiguous()

    def _reserve(self, size: int) -> None:
        missing = size - self._places.shape[1]
        if missing > 0:
            more = self._places.new_full((len(self._places), missing + size), HIDDEN)
            self._places = torch.cat([self._places, more], dim=1)

    def keep(self, paths: list[list[int]]) -> None:
        """Keep the nodes of each row's path, the root first, of the newest forward."""
        for row, path in enumerate(paths):
            offered, kept = self._offered[row], set(path)
            slots = [offered[node] for node in path]
            start = len(self.rows[row])
            self._places[row, slots] = torch.arange(start, start + len(path))
            self.rows[row] += slots
            self._ends[row] = max(self._ends[row], offered[-1] + 1)
            spare = self._free[row][len(offered) :]
            self._free[row] = [*(slot for node, slot in enumerate(offered) if node not in kept), *spare]
        self._offered = []

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but these; a row may be asked for twice."""
        self.rows, self._free = ([list(part[row]) for row in rows] for part in (self.rows, self._free))
        self._ends, self._offered = [self._ends[row] for row in rows], []
        self._places = self._places[list(rows)]
