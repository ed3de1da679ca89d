"""The angles of RoPE at the coming positions, computed for many steps at once."""

import torch

from .layer import Rope
from .modeling import DraftHead


_POSITIONS = 256


class RopeWindow:
    """Positions side by side, from where a text has come to. Steps inside it compute nothing.

    Args:
        head: whose angles they are.
    """

    def __init__(self, head: DraftHead) -> None:
        self._head, self._start, self._end = head, 0, 0
        self._rope: Rope | None = None

    def at(self, start: int, end: int) -> Rope:
        """Those of the positions from `start` to before `end`: `[1, end - start]`."""
        if not self._head.config.has_fixed_rope:  # the last position decides about all of them
            return self._of(start, end)
        if self._rope is None or start < self._start or end > self._end:
            self._start, self._end = start, max(end, start + _POSITIONS)
            self._rope = self._of(self._start, self._end)
        return self._rope.at(slice(start - self._start, end - self._start))

    def _of(self, start: int, end: int) -> Rope:
        return self._head.rope(torch.arange(start, end, device=self._head.device)[None])
