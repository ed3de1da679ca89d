"""Track which cache slots each row of a batch fills, and the slot and position of each row's next token."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import cached_length
from .forward import TargetForward
from .masks import last_position


class SlotMap:
    """Tracks which cache positions (slots) each batch row fills: first with the prompt's padding, then with the text.

    Rows have no gaps: a shorter row does not attend to the slots after its end, and its next entries overwrite them.
    `padding` `[b, s]` is 0 where the prompt has padding. All rows begin with `length` entries.
    """

    def __init__(self, padding: Tensor | None, length: int = 0) -> None:
        self.length = length  # number of entries of the longest row
        self._padding = None if padding is None else padding.bool()
        self._ends: list[int] | None = None  # `None` while all rows end together
        self._copied_ends: Tensor | None = None  # `[b, 1]` on the device of the last call of `ends`

    @property
    def is_even(self) -> bool:
        """Whether all rows end at the same slot."""
        return self._ends is None

    @property
    def pads(self) -> Tensor | None:
        """Number of padding slots before each row's prompt, `[b, 1]`; `None` without padding."""
        return None if self._padding is None else self._padding.logical_not().sum(dim=1, keepdim=True)

    def extend(self, counts: Sequence[int]) -> None:
        """Record that each row i got `counts[i]` new entries."""
        if self._ends is None and min(counts) == max(counts):
            self.length += counts[0]
            return
        starts = self._ends or [self.length] * len(counts)
        self._end_at([start + count for start, count in zip(starts, counts, strict=True)])

    def _end_at(self, ends: list[int]) -> None:
        self.length = max(ends)
        self._ends = None if min(ends) == self.length else ends
        self._copied_ends = None

    def forget(self, count: int) -> None:
        """Drop the first `count` slots, which all rows have filled, and renumber the others from 0."""
        ends = self._ends or [self.length]
        if self._padding is not None:
            self._padding = self._padding[:, count:] if count < self._padding.shape[1] else None
        self._end_at([end - count for end in ends])

    def keep_rows(self, rows: Sequence[int]) -> None:
        if self._padding is not None:
            self._padding = self._padding[list(rows)]
        if self._ends is not None:
            self._end_at([self._ends[row] for row in rows])

    def row_ends(self, rows: int) -> list[int]:
        """Return the first free slot of each of the `rows` rows, as a list."""
        return self._ends or [self.length] * rows

    def ends(self, device: torch.device) -> Tensor:
        """Return the first free slot of each row, as a tensor: `[b, 1]`, or `[1, 1]` if all rows have the same."""
        if self._ends is None:
            return torch.full((1, 1), self.length, device=device)
        if self._copied_ends is None or self._copied_ends.device != device:
            self._copied_ends = torch.tensor(self._ends, device=device)[:, None]
        return self._copied_ends

    def stays_even(self, blocks: Sequence[Sequence[int]]) -> bool:
        """Whether all rows end at the same slot, now and after each of these blocks is added; see `take`."""
        return self.is_even and all(min(counts) == max(counts) for counts in blocks)

    def take(self, blocks: Sequence[Sequence[int]], device: torch.device, ahead: int = 0) -> Tensor:
        """Record blocks of new entries; return the slots of these entries, and the next `ahead` slots.

        Block j has `blocks[j][i]` entries of row i. The slots are `[b, t + ahead]`, or `[1, t + ahead]` if all rows
        have the same; t is the sum of the blocks' largest counts. In a block, shorter rows repeat their last slot.
        """
        if self.stays_even(blocks):
            start = self.length
            for counts in blocks:
                self.extend(counts)
            return torch.arange(start, self.length + ahead, device=device)[None]
        ends = self.row_ends(len(blocks[0]) if blocks else 0)
        slots: list[list[int]] = [[] for _ in ends]
        for counts in blocks:
            for row, end, count in zip(slots, ends, counts, strict=True):
                row += [end + min(at, count - 1) for at in range(max(counts))]
            ends = [end + count for end, count in zip(ends, counts, strict=True)]
            self.extend(counts)
        # One copy to the device carries the ends as well.
        rows = [[*row, *range(end, end + max(ahead, 1))] for row, end in zip(slots, ends, strict=True)]
        taken = torch.tensor(rows, device=device)
        self._copied_ends = taken[:, len(slots[0]) : len(slots[0]) + 1]
        return taken[:, : len(slots[0]) + ahead]

    def visible(self, length: int, device: torch.device) -> Tensor | None:
        """Make the bool mask `[b, length]`, true where a row may attend to a slot; `None` if all slots are visible."""
        if self._padding is None and self._ends is None:
            return None
        seen = None if self._padding is None else _stretched(self._padding.to(device), length)
        if self._ends is not None:
            order = torch.arange(length, device=device)
            own = (order < self.ends(device)) | (order >= self.length)  # the caller is about to fill the last ones
            seen = own if seen is None else seen & own
        return seen

    def unpadded(self, length: int, rows: int, device: torch.device) -> Tensor:
        """Make a bool mask `[rows, length]`, false where a slot holds padding; extra rows repeat the last own row."""
        if self._padding is None:
            return torch.ones(rows, length, dtype=torch.bool, device=device)
        own = _stretched(self._padding.to(device), length)
        return own[torch.arange(rows, device=device).clamp(max=len(own) - 1)]


class RowEnds:
    """Tracks the cache slot and the position id of each row's next token.

    `positions` are the position ids of the whole prompt, cached tokens included: `[b or 1, s]`, or `[planes, b or 1,
    s]` if a token has several ids (M-RoPE). `mask` `[b, s]` is 0 where the prompt has padding.
    """

    # Each row's positions minus its slots, in each plane: one number if all are equal, else `[b, 1]` or
    # `[planes, b, 1]`. They are floats for targets with float positions.
    shift: float | Tensor

    def __init__(self, forward: TargetForward, positions: Tensor, mask: Tensor | None = None) -> None:
        target = forward.target
        # The target's device; if that is "meta" (offloaded weights), the device of the caller's text.
        self.device = positions.device if target.device.type == "meta" else target.device
        self.positions = positions.to(self.device)
        self.slots = SlotMap(None if mask is None else mask.to(self.device), cached_length(forward.cache))
        self.go_on_from(self.positions)
        self.last_position = last_position(target.config, self.prompt_length + int(max(map(max, self.shifts))))

    @property
    def prompt_length(self) -> int:
        """Number of positions of the prompt, padding included."""
        return self.positions.shape[-1]

    @property
    def length(self) -> int:
        """Number of positions of the longest row."""
        return max(self.ends)

    @property
    def ends(self) -> list[int]:
        """Number of positions of each row, padding included."""
        return self.slots.row_ends(len(self.shifts))

    @property
    def roots(self) -> list[list[float]]:
        """The position ids, one for each plane, of each row's newest token, which is the root of its next tree."""
        return [[end + shift for shift in shifts] for end, shifts in zip(self.ends, self.shifts, strict=True)]

    @property
    def levels_left(self) -> int:
        """Number of levels below the root that a tree may have, so that no node exceeds the target's last position."""
        last = self.last_position
        return sys.maxsize if last is None else max(last - int(max(map(max, self.roots))), 0)

    def __len__(self) -> int:
        return len(self.shifts)

    def go_on_from(self, positions: Tensor) -> None:
        """Set each row's next position id, in each plane, to 1 more than the last of the prompt's `positions`."""
        shifts = positions[..., -1] + 1 - self.prompt_length
        self._shift_by(shifts[:, None].tolist() if shifts.dim() == 1 else shifts.t().tolist())

    def expand(self, rows: int) -> None:
        """If the prompt's positions were given for one row, use them for all `rows` rows of the batch."""
        self._shift_by(self.shifts * (rows // len(self.shifts)))

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.slots.keep_rows(rows)
        self._shift_by([self.shifts[row] for row in rows])

    def _shift_by(self, shifts: list[list[float]]) -> None:
        self.shifts, first = shifts, shifts[0]
        self.shift = first[0]
        if len(first) > 1:
            self.shift = torch.tensor(shifts, device=self.device).t()[..., None]
        elif any(shift != first for shift in shifts):
            self.shift = torch.tensor(shifts, device=self.device)

    def prompt_mask(self, length: int) -> Tensor | None:
        """Make the integer attention mask `[b, length]` of the first slots; `None` if nothing is masked."""
        visible = self.slots.visible(length, self.device)
        return None if visible is None else visible.long()


def leading_pads(padding: Tensor) -> list[int]:
    """Count the padding tokens at the start of each row; `padding` `[b, s]` is 0 where a slot holds padding."""
    return padding.int().argmax(dim=-1).tolist()


def _stretched(mask: Tensor, length: int) -> Tensor:
    """Cut a bool mask to its first `length` columns, or extend it by columns of true."""
    missing = length - mask.shape[1]
    return mask[:, :length] if missing <= 0 else torch.cat([mask, mask.new_ones(len(mask), missing)], dim=1)
