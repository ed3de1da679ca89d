"""Prompt lookup: draft the tokens that followed the last time the text ended like this.

The index grows with the text and is never rebuilt; a query costs microseconds.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile, zip_longest
from operator import mul
from typing import Any

from torch import Tensor

from ..tree import CandidatePool, TreeShape
from ..verifying.rows import leading_pads
from .drafter import Committed, Drafter, DraftRequest
from .source import DraftCall, DraftSource


LONGEST_KEY = 4  # tokens; longer matches are measured from the text itself
LONGEST_MATCH = 16
LONGEST_DRAFT = 16
_CLASSES = (1, 2, 3, 4, 6, 9)  # shortest match of each class of the track record
# Of each length of a match, as far as a draft makes it longer
_CLASS_OF = [bisect_right(_CLASSES, length) - 1 for length in range(LONGEST_MATCH + LONGEST_DRAFT)]
_PRIOR = (0.15, 0.3, 0.45, 0.6, 0.75, 0.85)  # acceptance of a token in each class before anything is known
_PRIOR_WEIGHT = 4.0
_MEMORY = 0.98  # weight of the record when an outcome is added


@dataclass(frozen=True, slots=True)
class Match:
    """A continuation of the text.

    Attributes:
        length: tokens at the text's end that occurred before; 0 when none did.
        tokens: what followed then, nearest first.
        prefix_accept_probs: probability that at least the first i + 1 of `tokens` are accepted, from the track record.
    """

    length: int
    tokens: list[int]
    prefix_accept_probs: list[float]


NO_MATCH = Match(0, [], [])


class SuffixIndex:
    """All n-grams of one growing text, and where each last occurred."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._followed: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST_KEY)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text; what stood before each token is now known to be followed by it."""
        for token in tokens:
            end = len(self.tokens)
            for size, places in enumerate(self._followed, start=1):
                if size > end:
                    break
                places[tuple(self.tokens[end - size : end])] = end
            self.tokens.append(token)

    def find(self) -> tuple[int, int]:
        """The longest match of the text's end: its length, and the place of the token after it; `(0, 0)` for none."""
        for size in range(min(LONGEST_KEY, len(self.tokens)), 0, -1):
            place = self._followed[size - 1].get(tuple(self.tokens[-size:]))
            if place is not None:
                return self._length_at(place, size), place
        return 0, 0

    def _length_at(self, place: int, length: int) -> int:
        end = len(self.tokens)
        while length < min(place, LONGEST_MATCH) and self.tokens[place - length - 1] == self.tokens[end - length - 1]:
            length += 1
        return length


class TrackRecord:
    """How often the next token of a match was right, by class of match length. Recent outcomes weigh more.

    Args:
        prior: the share in each class before anything is known.
    """

    def __init__(self, prior: Sequence[float] = _PRIOR) -> None:
        self._right = [rate * _PRIOR_WEIGHT for rate in prior]
        self._tried = [_PRIOR_WEIGHT] * len(prior)

    def rates(self, length: int) -> list[float]:
        """Probabilities that the token after a match of `length` is right, or one of one more, and so on."""
        rates = [right / tried for right, tried in zip(self._right, self._tried, strict=True)]
        return [rates[index] for index in _CLASS_OF[length:]]

    def add(self, length: int, right: bool) -> None:
        index = _CLASS_OF[length]
        self._right[index] = self._right[index] * _MEMORY + right
        self._tried[index] = self._tried[index] * _MEMORY + 1.0


class Lookup:
    """Proposes continuations of one text, and records how often they are right, used or not.

    Args:
        never_drafted: tokens at which a continuation ends, such as those that stand for an image; none follows them.
    """

    def __init__(self, never_drafted: frozenset[int] = frozenset()) -> None:
        self._never_drafted = never_drafted
        self._index = SuffixIndex()
        self._record = TrackRecord()

    @property
    def length(self) -> int:
        """Tokens of the text it has seen."""
        return len(self._index.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens, and record for each whether the proposal there was right."""
        if not self._index.tokens:  # the prompt was not written by the target: it is no evidence
            self._index.extend(tokens)
            return
        for token in tokens:
            length, place = self._index.find()
            if length:
                self._record.add(length, self._index.tokens[place] == token)
            self._index.extend([token])

    def match(self, most_tokens: int = LONGEST_DRAFT) -> Match:
        """The continuation of the text's end, at most `most_tokens` of it."""
        length, place = self._index.find()
        seen = self._index.tokens
        if length == 0 or seen[-1] in self._never_drafted:
            return NO_MATCH
        period = len(seen) - place  # a match that runs into the text's end goes on by repeating itself
        follow = (seen[place + offset % period] for offset in range(most_tokens))
        tokens = list(takewhile(lambda token: token not in self._never_drafted, follow))
        rates = self._record.rates(length)[: len(tokens)]
        return Match(length, tokens, list(accumulate(rates, mul)))


class LookupDrafter(Drafter):
    """One `Lookup` per row of a batch. What it observes is read when a match is asked for.

    Args:
        pads: padding tokens before each row's prompt.
        origins: what each row's text is written from, such as the encoder's tokens, read before the text: a match may
            lie there. `None` for nothing.
        never_drafted: see `Lookup`.
    """

    proposable_tokens = 1
    most_levels = LONGEST_DRAFT

    def __init__(
        self,
        pads: list[int],
        *,
        origins: list[list[int]] | None = None,
        never_drafted: frozenset[int] = frozenset(),
    ) -> None:
        self._lookups = [Lookup(never_drafted) for _ in pads]
        self._pads = pads
        self._origins = [[] for _ in pads] if origins is None else origins
        self._unread: list[Tensor | Sequence[Sequence[int]]] = []
        self._matches: list[Match] | None = None

    def observe(self, committed: Committed) -> None:
        self._unread.append(committed.tokens if committed.rows is None else committed.rows)
        self._matches = None

    def read(self, at_least: int = 1) -> None:
        for part in self._unread:
            found: Sequence[Sequence[int]] = part.tolist() if isinstance(part, Tensor) else part
            rows = zip(self._lookups, self._pads, self._origins, found, strict=True)
            for lookup, pads, origin, tokens in rows:
                lookup.extend(tokens if lookup.length else [*origin, *tokens[pads:]])
        self._unread.clear()

    @property
    def matches(self) -> list[Match]:
        """The match of every row."""
        if self._matches is None:
            self.read()
            self._matches = [lookup.match() for lookup in self._lookups]
        return self._matches

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        """A chain of at most `lookup` nodes of each row, on the host; see `CandidatePool.from_chains`."""
        found, most, least = self.matches, request.shape.lookup, request.least_prob
        probs = [[prob for prob in one.prefix_accept_probs[:most] if prob >= least] for one in found]
        chains = [one.tokens[: len(kept)] for one, kept in zip(found, probs, strict=True)]
        return CandidatePool.from_chains(chains, probs)

    def keep_rows(self, rows: list[int]) -> None:
        self.read()
        self._lookups = [self._lookups[row] for row in rows]
        self._pads = [self._pads[row] for row in rows]
        self._origins = [self._origins[row] for row in rows]
        self._matches = None


class PromptLookup(DraftSource):
    """The text so far as a source, which every call has."""

    @property
    def default_shape(self) -> TreeShape:
        return TreeShape(1, 0, 1, lookup=LONGEST_DRAFT)

    def fingerprint(self) -> str:
        return "0" * 16

    def identity(self) -> dict[str, Any]:
        return {"name_or_path": "prompt lookup"}

    def drafter(self, call: DraftCall) -> LookupDrafter:
        pads = [0] * call.rows if call.text_mask is None else leading_pads(call.text_mask)
        return LookupDrafter(pads, origins=call.origins, never_drafted=call.never_drafted)


def mean_accept_probs(matches: Sequence[Match], row_weights: Sequence[float]) -> list[float]:
    """Means of `prefix_accept_probs` over rows that advance on their own, weighted by `row_weights`."""
    columns = zip_longest(*(match.prefix_accept_probs for match in matches), fillvalue=0.0)
    return [sum(map(mul, row_weights, chances)) / len(matches) for chances in columns]
