"""One number for each row of a batch."""

from typing import Any


class RowCounts(tuple[int, ...]):
    """One number per row of the batch, in the order of the rows.

    With one row it compares with an integer and converts to it: `record.accepted == 3`, `int(record.accepted)`.
    Several rows equal no integer.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return bool(tuple(self) == self._like_self(other))

    def __ne__(self, other: object) -> bool:
        return bool(tuple(self) != self._like_self(other))

    def __lt__(self, other: Any) -> bool:
        return bool(tuple(self) < self._like_self(other))

    def __le__(self, other: Any) -> bool:
        return bool(tuple(self) <= self._like_self(other))

    def __gt__(self, other: Any) -> bool:
        return bool(tuple(self) > self._like_self(other))

    def __ge__(self, other: Any) -> bool:
        return bool(tuple(self) >= self._like_self(other))

    __hash__ = tuple.__hash__

    def __int__(self) -> int:
        """The number of the only row.

        Raises:
            ValueError: there are several rows.
        """
        if len(self) != 1:
            raise ValueError(f"{tuple(self)} counts {len(self)} rows. Take one of them by its index, or their sum.")
        return self[0]

    def to_json(self) -> int | list[int]:
        """An integer for one row, as reports of one prompt have it, otherwise a list."""
        return self[0] if len(self) == 1 else list(self)

    def _like_self(self, other: Any) -> Any:
        return (other,) if isinstance(other, int) and len(self) == 1 else other
