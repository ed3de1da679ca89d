"""What may follow the text: the tokens that followed where it, or a memory, ended alike, as one tree by their odds.

A tree of frequencies, best first, is that of SuffixDecoding (arXiv 2411.04975, section 4). A frequency from few places
is no probability, so the odds are those that tokens of like evidence turned out to have.
"""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from .suffixes import SEPARATOR, Suffixes


LONGEST_DRAFT = 16  # levels
_MOST_PLACES = 24  # that a match is judged by
_MATCHES = 3  # lengths of them: the longest, half of it, a quarter
_LEAST_SHARE = 1 / 16  # of the places, that a token followed at
_LEAST_ODDS = 0.02  # of a node
_LENGTHS = (1, 2, 3, 4, 6, 9, 14)  # shortest match of each class
_ONCE = (0.3, 0.35, 0.4, 0.45, 0.55, 0.8, 0.85)  # acceptance of what followed at the only place, by class of length
_ALWAYS = (0.7, 0.7, 0.7, 0.75, 0.8, 0.9, 0.95)  # at two or three places, or more
_SHARES, _PARTLY = (0.125, 0.25, 0.5), (0.04, 0.1, 0.18, 0.3)  # at some; from the benchmarks' kind of texts
_PRIOR_WEIGHT = 4.0
_MEMORY = 0.98  # weight of the record when an outcome is added


def length_class(length: int) -> int:
    """The class of a match of so many tokens, at least one."""
    return bisect_right(_LENGTHS, length) - 1


class TrackRecord:
    """How often something of a class was right. Recent outcomes weigh more.

    Args:
        priors: the share in each class before anything is known.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self._right = [rate * _PRIOR_WEIGHT for rate in priors]
        self._tried = [_PRIOR_WEIGHT] * len(priors)

    def rate(self, index: int) -> float:
        """The probability that one of a class is right."""
        return self._right[index] / self._tried[index]

    def add(self, index: int, right: bool) -> None:
        self._right[index] = self._right[index] * _MEMORY + right
        self._tried[index] = self._tried[index] * _MEMORY + 1.0


def match_record() -> TrackRecord:
    """By length of the match and count: of tokens that followed at so many of so many places."""
    priors = zip(_ONCE, _ALWAYS, strict=True)
    return TrackRecord([rate for once, always in priors for rate in (once, always, (1 + always) / 2, *_PARTLY)])


def _class_of(length: int, count: int, places: int) -> int:
    if count == places:
        evidence = 0 if places == 1 else 1 if places < 4 else 2
    else:
        evidence = 3 + bisect_right(_SHARES, count / places)
    return length_class(length) * 7 + evidence


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is searched.

    Attributes:
        parts: its texts. They may grow between two searches.
        record: how often what it proposed was right.
        proposer: flag of `DraftTree.proposers`.
    """

    parts: Sequence[Suffixes]
    record: TrackRecord
    proposer: int


class Remembered(Protocol):
    """Texts of earlier calls, to which other threads may add."""

    @property
    def corpus(self) -> Corpus:
        """As it is now."""
        ...


Place = tuple[Suffixes, int]


class _Occurrences:
    """Places of one corpus where the text ended alike, `depth` tokens ago."""

    __slots__ = ("_corpus", "_depth", "_followers", "_length", "_places", "odds")

    def __init__(self, corpus: Corpus, length: int, depth: int, places: Sequence[Place], odds: float = 1.0) -> None:
        self._corpus, self._length, self._depth, self._places = corpus, length, depth, places
        self.odds = odds  # of the newest of these tokens
        self._followers: list[tuple[int, int, _Occurrences]] | None = None

    @property
    def proposer(self) -> int:
        return self._corpus.proposer

    def followers(self) -> list[tuple[int, int, "_Occurrences"]]:
        """The tokens that follow at more than a few places, their classes in the record, and where they do."""
        if self._followers is not None:
            return self._followers
        found: dict[int, list[Place]] = {}
        for place in self._places:
            part, position = place
            tokens, depth = part.tokens, self._depth
            if position + depth >= len(tokens):  # a match that runs into the text's end goes on by repeating itself
                depth %= len(tokens) - position
            found.setdefault(tokens[position + depth], []).append(place)
        self._followers, total = [], len(self._places)
        for token, places in found.items():
            if token == SEPARATOR or len(places) < _LEAST_SHARE * total:
                continue
            index = _class_of(self._length, len(places), total)
            odds = self._corpus.record.rate(index)
            below = _Occurrences(self._corpus, self._length + 1, self._depth + 1, places, odds)
            self._followers.append((token, index, below))
        return self._followers

    def judge(self, token: int) -> None:
        """Record which of the followers the text went on with."""
        for own, index, _ in self.followers():
            self._corpus.record.add(index, own == token)


class Continuations:
    """Tokens that may follow a text: a tree that grows best first, as far as it is asked for.

    Args:
        text: what may follow.
        corpora: where it is looked for.
        never_drafted: tokens that end a branch.
        branches: whether it may; otherwise it is a chain of the likeliest.

    Attributes:
        tokens: of the nodes, every parent before its children.
        parents: of each node; -1 is the text's end.
        odds: that the text goes on along the whole path to a node; falling.
        proposers: flags of the corpora that each node was found in.
    """

    def __init__(
        self,
        text: Suffixes,
        corpora: Sequence[Corpus],
        never_drafted: Collection[int] = frozenset(),
        *,
        branches: bool = True,
    ) -> None:
        self.tokens, self.parents, self.odds, self.proposers = list[int](), list[int](), list[float](), list[int]()
        self._never_drafted, self._branches = never_drafted, branches
        context = text.context
        self._matches = [match for corpus in corpora for match in _matches(corpus, context)]
        self._ends = len(text) > 0 and text.tokens[-1] in never_drafted
        self._heap: list[tuple[float, int, int, int, int, list[_Occurrences]]] | None = None
        self._pushed = 0

    def grow(self, most: int) -> "Continuations":
        """The same, with `most` nodes where there are so many."""
        if self._heap is None:
            self._heap = []
            if not self._ends:
                self._push(self._matches, -1, 1.0, 1)
        while self._heap and len(self.tokens) < most:
            odds, _, token, parent, level, found = heappop(self._heap)
            proposers = 0
            for match in found:
                proposers |= match.proposer
            self.tokens.append(token)
            self.parents.append(parent)
            self.odds.append(-odds)
            self.proposers.append(proposers)
            if level < LONGEST_DRAFT:
                self._push(found, len(self.tokens) - 1, -odds, level + 1)
        return self

    def _push(self, matches: Sequence[_Occurrences], parent: int, odds: float, level: int) -> None:
        assert self._heap is not None
        found: dict[int, list[_Occurrences]] = {}
        for match in matches:
            for token, _, below in match.followers():
                if token not in self._never_drafted:
                    found.setdefault(token, []).append(below)
        for token, places in found.items():
            path_odds = odds * max(place.odds for place in places)
            if path_odds >= _LEAST_ODDS:
                heappush(self._heap, (-path_odds, self._pushed, token, parent, level, places))
                self._pushed += 1
        if not self._branches:
            del self._heap[1:]

    def judge(self, token: int) -> None:
        """Learn from what the text went on with, whether or not it was proposed."""
        for match in self._matches:
            match.judge(token)


def _matches(corpus: Corpus, context: bytes) -> list[_Occurrences]:
    """Where the text ended as now, by the longest match and by shorter ones that were found at more places."""
    searches = [(part, part.search(context)) for part in corpus.parts]
    length = max((search.longest for _, search in searches), default=0)
    found, known = list[_Occurrences](), 0
    while length and len(found) < _MATCHES and known < _MOST_PLACES:
        places = list[Place]()
        for part, search in searches:
            if search.longest >= length and len(places) < _MOST_PLACES:
                places += [(part, position) for position in search.run(length, _MOST_PLACES)]
        places = places[:: -(-len(places) // _MOST_PLACES)]
        if len(places) > known:
            found.append(_Occurrences(corpus, length, 0, places))
            known = len(places)
        length //= 2
    return found
