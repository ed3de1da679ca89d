"""Find earlier occurrences of a text's last tokens, by an index of positions sorted by the tokens before them.

All positions after the same tokens are one range of this order. A longer match is a narrower range inside it.
The index is a suffix array (Manber and Myers, SIAM Journal on Computing 22, 1993) of the texts read backwards.
"""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from struct import pack

import numpy as np


LONGEST_MATCH = 32  # Maximum number of tokens of a context that are compared.
LARGEST_TOKEN = 2**31 - 1
SEPARATOR = 2**32 - 1  # Separates two texts: no match reaches across it.
_BYTES = 4  # Bytes of a token.
_MOST_BYTES = LONGEST_MATCH * _BYTES
_BEYOND = b"\xff" * (_MOST_BYTES + 1)  # A context followed by this sorts after all contexts that begin with it.
_NEAR = 4  # To widen a range, this many positions are compared one by one before a binary search.
_FEW = 64  # Up to this many tokens are inserted one by one; more are sorted at once.
_STRIDE = 128  # `_marks` holds the context of every 128th position of a long order, which speeds up `find`.
_INTEGER = np.dtype(array("I").typecode)


class Suffixes:
    """Indexes a growing text, or several texts joined by `SEPARATOR`. The index takes 12 to 14 bytes for each token.

    Threads may share an index that no longer grows.
    """

    def __init__(self, tokens: "Sequence[int] | array[int]" = ()) -> None:
        self.tokens = array("I")  # of all texts
        self._backwards = bytearray()  # the tokens, newest first and big-endian, so that bytes sort like tokens
        # Indices in `tokens`, without 0, sorted by the tokens before each index, the nearest token first.
        self.order = array("I")
        self._marks = list[bytes]()  # contexts of every `_STRIDE`th position in `order`; empty after single insertions
        self._newest: tuple[bytes, int] | None = None  # context of the text's end and its index in the order, if known
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def context(self) -> bytes:
        """The text's last tokens as bytes, the newest token first, for `search`."""
        if self._newest is None:
            context = bytes(self.before(len(self.tokens)))
            self._newest = context, self.find(context)
        return self._newest[0]

    def before(self, position: int) -> bytearray:
        """Return the context of a position: up to `LONGEST_MATCH` tokens before it, as bytes, the newest first."""
        start = len(self._backwards) - _BYTES * position
        return self._backwards[start : start + _MOST_BYTES]

    def extend(self, tokens: "Sequence[int] | array[int]") -> None:
        """Append tokens to the text, and insert their positions into `order`, which is sorted by context."""
        first, count = len(self.tokens), len(tokens)
        self.tokens.extend(tokens)
        room = len(self._backwards) - _BYTES * first  # unused bytes in front of the text
        if room < _BYTES * count:
            spare = max(_BYTES * count, len(self._backwards)) - room if first else _BYTES * count
            self._backwards[:0] = bytes(spare)
        end = len(self._backwards) - _BYTES * first
        self._backwards[end - _BYTES * count : end] = pack(f">{count}I", *reversed(tokens))
        if count > max(_FEW, first // 16):
            self._newest = None
            self._set_order(_sorted(np.frombuffer(self.tokens, _INTEGER)))
            return
        self._marks = []
        for position in range(max(first, 1), first + count):
            if self._newest is not None:
                place, self._newest = self._newest[1], None
            else:
                place = bisect_left(self.order, self.before(position), key=self.before)
            self.order.insert(place, position)

    def without_first(self, count: int) -> "Suffixes":
        """Return an index of only those texts that begin after the first `count` tokens, without sorting again.

        The new index begins with the separator before these texts. No match reaches tokens before the separator.
        """
        tokens, order = (np.frombuffer(part, _INTEGER) for part in (self.tokens, self.order))
        first = max(count - 1, 0)
        cut = first + int(np.argmax(tokens[first:] == SEPARATOR))
        kept = Suffixes()
        kept.tokens = self.tokens[cut:]
        kept._backwards = self._backwards[: len(self._backwards) - _BYTES * cut]
        kept._set_order(order[order > cut] - _INTEGER.type(cut))
        return kept

    def _set_order(self, order: np.ndarray) -> None:
        self.order = array("I", order.tobytes())
        if len(order) > _FEW * _STRIDE:
            self._marks = [bytes(self.before(position)) for position in self.order[::_STRIDE]]

    def find(self, wanted: "bytes | bytearray") -> int:
        """Return the index at which the context `wanted` would be inserted in `order`, which is sorted by context."""
        first, last = 0, len(self.order)
        if self._marks:
            mark = bisect_left(self._marks, wanted)
            first, last = max(mark - 1, 0) * _STRIDE, min(mark * _STRIDE, last)
        return bisect_left(self.order, wanted, first, last, key=self.before)

    def search(self, context: bytes) -> "Search":
        """Return a `Search` of this index for the newest tokens of `context`, bytes such as `before` returns."""
        newest = self._newest
        place = newest[1] if newest is not None and newest[0] is context else self.find(context)
        return Search(self, context, place)

    def begins(self, position: int, wanted: bytes) -> bool:
        """Whether the tokens before a position, as bytes with the newest token first, begin with `wanted`."""
        return self._backwards.startswith(wanted, len(self._backwards) - _BYTES * position)


class Search:
    """Finds where a context's newest tokens occur in an index. `longest` is the length of the longest match."""

    __slots__ = ("_context", "_first", "_last", "_text", "longest")

    def __init__(self, text: Suffixes, context: bytes, place: int) -> None:
        self._text, self._context = text, context
        self._first = self._last = place
        neighbours = text.order[max(place - 1, 0) : place + 1]  # one of these two has the longest match
        self.longest = max((count_shared(context, text.before(position)) for position in neighbours), default=0)

    def run(self, length: int, most: int) -> "array[int]":
        """Return up to `most` positions after occurrences of the context's `length` newest tokens, evenly selected.

        Each call must pass a smaller `length` than the previous call, because it widens the range found by that call.
        """
        text, order, wanted = self._text, self._text.order, self._context[: _BYTES * length]
        first, last = self._first, self._last
        while first and text.begins(order[first - 1], wanted):
            first = first - 1 if self._first - first < _NEAR else text.find(wanted)
        while last < len(order) and text.begins(order[last], wanted):
            last = last + 1 if last - self._last < _NEAR else text.find(wanted + _BEYOND)
        self._first, self._last = first, last
        return order[first : last : max(-(-(last - first) // most), 1)]


def count_shared(one: bytes, other: bytes | bytearray) -> int:
    """Return the number of tokens in the longest common beginning of two texts, both given as bytes."""
    shared = min(len(one), len(other))
    differing = int.from_bytes(one[:shared]) ^ int.from_bytes(other[:shared])
    return shared // _BYTES if not differing else (8 * shared - differing.bit_length()) // (8 * _BYTES)


def _sorted(tokens: np.ndarray) -> np.ndarray:
    """Return all positions but the first, sorted by the tokens before them: by one token, then by two, by four, ..."""
    count = len(tokens)
    ranks = np.zeros(count, np.int64)
    ranks[1:] = tokens[:-1]
    ranks[1:] += 1  # rank 0: no token is before the first position
    step, order = 1, np.arange(count)
    while step <= LONGEST_MATCH:
        before = np.zeros(count, np.int64)
        if step > 1:
            half = step // 2
            before[half:] = ranks[:-half]
        keys = ranks * (count + 2) + before if step > 1 else ranks
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        ranks[order] = np.concatenate([[0], np.cumsum(keys[1:] != keys[:-1])])
        step *= 2
    return order[1:].astype(_INTEGER)
