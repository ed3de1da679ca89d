"""Finds where texts had the same words before: their positions, sorted by the tokens before each.

Positions whose text ends like the present one are one run of that order, and a longer match is a narrower run inside
it: a suffix array (Manber and Myers, SIAM Journal on Computing 22, 1993) of the texts read backwards.
"""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from struct import pack

import numpy as np


LONGEST_MATCH = 32  # Tokens of a context that are compared.
LARGEST_TOKEN = 2**31 - 1
SEPARATOR = 2**32 - 1  # Stands between two texts: no match reaches across it.
_BYTES = 4  # Bytes of a token.
_MOST_BYTES = LONGEST_MATCH * _BYTES
_BEYOND = b"\xff" * (_MOST_BYTES + 1)  # Appended to a context, comes after all that begin with it.
_NEAR = 4  # Positions beside a run that are looked at one by one, before a search.
_FEW = 64  # Tokens that are inserted one by one; more are sorted at once.
_STRIDE = 128  # Positions between two marks.
_INTEGER = np.dtype(array("I").typecode)


class Suffixes:
    """A growing text, or several with `SEPARATOR` between them: 12 to 14 bytes a token.

    Threads may share one that no longer grows.

    Attributes:
        tokens: tokens of all texts.
        order: positions with a token before them and one after, sorted by the tokens before them.
    """

    def __init__(self, tokens: "Sequence[int] | array[int]" = ()) -> None:
        self.tokens = array("I")
        self._backwards = bytearray()  # the tokens, newest first and big-endian: bytes compare as contexts do
        self.order = array("I")
        self._marks = list[bytes]()  # what stands before each 128th of them, of many that were sorted at once
        self._newest: tuple[bytes, int] | None = None  # the end of the text and its place, once it was searched for
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def context(self) -> bytes:
        """The end of the text, its newest token first, as `search` takes it."""
        if self._newest is None:
            context = bytes(self.before(len(self.tokens)))
            self._newest = context, self.find(context)
        return self._newest[0]

    def before(self, position: int) -> bytearray:
        """Give the context before a position, its newest token first."""
        start = len(self._backwards) - _BYTES * position
        return self._backwards[start : start + _MOST_BYTES]

    def extend(self, tokens: "Sequence[int] | array[int]") -> None:
        """Append tokens to the text, and their positions to the order."""
        first, count = len(self.tokens), len(tokens)
        self.tokens.extend(tokens)
        room = len(self._backwards) - _BYTES * first  # in front of the text
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
        """Keep the texts that begin after the first `count` tokens, without sorting them anew.

        The separator before them stays: the tokens before it decide the order of no match.
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
        """Find the place of a context in the order: among the marks first, which compare faster."""
        first, last = 0, len(self.order)
        if self._marks:
            mark = bisect_left(self._marks, wanted)
            first, last = max(mark - 1, 0) * _STRIDE, min(mark * _STRIDE, last)
        return bisect_left(self.order, wanted, first, last, key=self.before)

    def search(self, context: bytes) -> "Search":
        """Search the texts for places that end like a context."""
        newest = self._newest
        place = newest[1] if newest is not None and newest[0] is context else self.find(context)
        return Search(self, context, place)

    def begins(self, position: int, wanted: bytes) -> bool:
        """Whether the context before a position begins with the wanted bytes."""
        return self._backwards.startswith(wanted, len(self._backwards) - _BYTES * position)


class Search:
    """Positions of some texts around the place of a context.

    Attributes:
        longest: how many of the context's newest tokens were found side by side, with a token after them.
    """

    __slots__ = ("_context", "_first", "_last", "_text", "longest")

    def __init__(self, text: Suffixes, context: bytes, place: int) -> None:
        self._text, self._context = text, context
        self._first = self._last = place
        neighbours = text.order[max(place - 1, 0) : place + 1]  # nothing else begins more alike
        self.longest = max((_alike(context, text.before(position)) for position in neighbours), default=0)

    def run(self, length: int, most: int) -> "array[int]":
        """Find positions after the `length` newest tokens: at most `most`, spread evenly.

        The next length that is asked for must be shorter: its run holds this one.
        """
        text, order, wanted = self._text, self._text.order, self._context[: _BYTES * length]
        first, last = self._first, self._last
        while first and text.begins(order[first - 1], wanted):
            first = first - 1 if self._first - first < _NEAR else text.find(wanted)
        while last < len(order) and text.begins(order[last], wanted):
            last = last + 1 if last - self._last < _NEAR else text.find(wanted + _BEYOND)
        self._first, self._last = first, last
        return order[first : last : max(-(-(last - first) // most), 1)]


def _alike(one: bytes, other: bytearray) -> int:
    """Count the tokens that two contexts both begin with."""
    shared = min(len(one), len(other))
    differing = int.from_bytes(one[:shared]) ^ int.from_bytes(other[:shared])
    return shared // _BYTES if not differing else (8 * shared - differing.bit_length()) // (8 * _BYTES)


def _sorted(tokens: np.ndarray) -> np.ndarray:
    """Sort all positions but the first by the tokens before them: by the newest one, then two, four and so on."""
    count = len(tokens)
    ranks = np.zeros(count, np.int64)
    ranks[1:] = tokens[:-1]
    ranks[1:] += 1  # nothing stands before the first
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
