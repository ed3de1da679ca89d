"""Grows one tree of the tokens that may follow a text, by their odds: tokens that followed at places that end like it.

Growing a tree of frequencies best first is SuffixDecoding (arXiv 2411.04975, section 4). A frequency at few places is
no probability, so the odds of a token are the acceptance rate of tokens with like evidence.
"""

from array import array
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from ..tree import Branches
from .suffixes import SEPARATOR, Suffixes


LONGEST_DRAFT = 16  # Levels of a tree at most.
_MOST_PLACES = 24  # Places at most that a match is judged by.
_MATCHES = 3  # Lengths of match that are looked at: the longest, half of it, a quarter.
_LEAST_SHARE = 1 / 16  # Share of the places at which a token must have followed.
_LEAST_ODDS = 0.02  # Odds that a node must have.
_LENGTHS = (1, 2, 3, 4, 6, 9, 14)  # The shortest match of each class.
# Acceptance before anything is known, measured on the benchmarks' kind of texts:
_ONCE = (0.3, 0.35, 0.4, 0.45, 0.55, 0.8, 0.85)  # of a token that followed at the only place, by class of length;
_ALWAYS = (0.7, 0.7, 0.7, 0.75, 0.8, 0.9, 0.95)  # of one that followed at each of several places;
_SHARES, _PARTLY = (0.125, 0.25, 0.5), (0.04, 0.1, 0.18, 0.3)  # of one that followed at some, by their share;
_ODDS, _OPPOSED = (0.1, 0.2, 0.4, 0.7, 0.9), (0.01, 0.03, 0.06, 0.2, 0.4, 0.7)  # where a drafter has only others.
_NOWHERE = -2  # Index of a node that a drafter lacks.
_PRIOR_WEIGHT = 4.0  # Outcomes that a prior counts as.
_MEMORY = 0.98  # Weight of a record when an outcome is added.


def length_class(length: int) -> int:
    """Classify a match by its tokens, at least one."""
    return bisect_right(_LENGTHS, length) - 1


class TrackRecord:
    """Counts how often members of each class were right. Recent outcomes weigh more.

    Args:
        priors: share of right ones in each class, before anything is known.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self._right = [rate * _PRIOR_WEIGHT for rate in priors]
        self._tried = [_PRIOR_WEIGHT] * len(priors)

    def rate(self, index: int) -> float:
        """Estimate the probability that a member of a class is right."""
        return self._right[index] / self._tried[index]

    def add(self, index: int, right: bool) -> None:
        self._right[index] = self._right[index] * _MEMORY + right
        self._tried[index] = self._tried[index] * _MEMORY + 1.0


def match_record() -> TrackRecord:
    """Make a record of tokens that followed a match, by its length and the share of places at which they followed.

    Its last classes are of tokens whose place a drafter gave to others alone, by their odds without that.
    """
    priors = zip(_ONCE, _ALWAYS, strict=True)
    rates = [rate for once, always in priors for rate in (once, always, (1 + always) / 2, *_PARTLY)]
    return TrackRecord([*rates, *_OPPOSED])


def _class_of(length: int, count: int, places: int) -> int:
    if count == places:
        evidence = 0 if places == 1 else 1 if places < 4 else 2
    else:
        evidence = 3 + bisect_right(_SHARES, count / places)
    return length_class(length) * 7 + evidence


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts that are searched.

    Attributes:
        parts: the texts. They may grow between two searches.
        record: how often tokens found in them were right.
        proposer: their flag of `DraftTree.proposers`.
    """

    parts: Sequence[Suffixes]
    record: TrackRecord
    proposer: int


class Remembered(Protocol):
    """Texts of earlier calls, to which other threads may add."""

    @property
    def corpus(self) -> Corpus:
        """The texts now."""
        ...


Place = tuple["array[int]", int, int]  # tokens, where in them the text ended alike, and how many there were then


class _Occurrences:
    """Places of one corpus that end like the text, and the `depth` tokens that followed at all of them.

    Attributes:
        corpus: the one that has the places.
        odds: odds of the newest of these tokens.
    """

    __slots__ = ("_class", "_depth", "_followers", "_length", "_places", "corpus", "odds")

    def __init__(self, corpus: Corpus, length: int, depth: int, places: Sequence[Place], index: int = 0) -> None:
        self.corpus, self._length, self._depth, self._places = corpus, length, depth, places
        self._class, self.odds = index, corpus.record.rate(index)
        self._followers: dict[int, _Occurrences] | None = None

    @property
    def opposed_odds(self) -> float:
        """Odds of the newest token if a drafter proposes only others."""
        return self.corpus.record.rate(self._opposed_class)

    @property
    def _opposed_class(self) -> int:
        return bisect_right(_ODDS, self.odds) - len(_OPPOSED)

    def followers(self) -> "dict[int, _Occurrences]":
        """Find the tokens that follow at more than a few places, and where each does."""
        if self._followers is not None:
            return self._followers
        found: dict[int, list[Place]] = {}
        for place in self._places:
            tokens, position, count = place
            at = position + self._depth
            if at >= count:  # a match that runs into the text's end goes on by repeating itself
                at = position + self._depth % (count - position)
            found.setdefault(tokens[at], []).append(place)
        found.pop(SEPARATOR, None)
        corpus, length, below, total = self.corpus, self._length, self._depth + 1, len(self._places)
        self._followers = {
            token: _Occurrences(corpus, length + 1, below, places, _class_of(length, len(places), total))
            for token, places in found.items()
            if len(places) >= _LEAST_SHARE * total
        }
        return self._followers

    def judge(self, token: int) -> "list[_Occurrences]":
        """Record which follower was right, by the text's next `token`; returns its places, if it is one."""
        record, followers = self.corpus.record, self.followers()
        for own, below in followers.items():
            record.add(below._class, own == token)
        return [followers[token]] if token in followers else []

    def judge_beside(self, token: int, drafted: Collection[int]) -> "list[_Occurrences]":
        """Like `judge`, but only for tokens the drafter did not propose, at a node where it proposed others."""
        record, followers = self.corpus.record, self.followers()
        for own, below in followers.items():
            if own not in drafted:
                record.add(below._opposed_class, own == token)
        return [followers[token]] if token in followers else []


class Continuations:
    """A tree of tokens that may follow a text. It grows best first, as far as a caller asks.

    Args:
        text: the text that goes on.
        corpora: searched for its end.
        never_drafted: tokens that end a branch.
        branches: whether nodes may have several children; otherwise they are a chain of the likeliest tokens.

    Attributes:
        tokens: token of each node, every parent before its children.
        parents: parent of each node; -1 is the text's end.
        odds: odds that the text goes on along the whole path to each node; falling.
        proposers: flags of the corpora that each node was found in.
        odds_beside: odds of the nodes that a drafter does not have, 0 for others; `None` before `weigh_beside`.
        shared: the drafter's nodes that are among these, with the odds here.
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
        self._found = list[list[_Occurrences]]()  # of each node
        self._drafted: dict[int, dict[int, int]] = {}  # children of a drafter's nodes
        self.odds_beside: list[float] | None = None
        self.shared: dict[int, float] = {}

    def grow(self, most: int) -> "Continuations":
        """Grow to `most` nodes, or as many as there are, and return the tree."""
        if self._heap is None:
            self._heap = []
            if not self._ends:
                self._push(self._matches, -1, 1.0, 1)
        while self._heap and len(self.tokens) < most:
            odds, _, token, parent, level, found = heappop(self._heap)
            proposers = 0
            for match in found:
                proposers |= match.corpus.proposer
            self.tokens.append(token)
            self.parents.append(parent)
            self.odds.append(-odds)
            self.proposers.append(proposers)
            self._found.append(found)
            if level < LONGEST_DRAFT:
                self._push(found, len(self.tokens) - 1, -odds, level + 1)
        return self

    def _push(self, matches: Sequence[_Occurrences], parent: int, odds: float, level: int) -> None:
        assert self._heap is not None
        found: dict[int, list[_Occurrences]] = {}
        for match in matches:
            for token, below in match.followers().items():
                found.setdefault(token, []).append(below)
        for token, places in found.items():
            path_odds = odds * max([place.odds for place in places])
            if path_odds >= _LEAST_ODDS and token not in self._never_drafted:
                heappush(self._heap, (-path_odds, self._pushed, token, parent, level, places))
                self._pushed += 1
        if not self._branches:
            del self._heap[1:]

    def weigh_beside(self, tokens: Sequence[int], parents: Sequence[int], most: int) -> None:
        """Weigh the `most` best nodes beside those of a drafter, whose parents are -1 for the text's end.

        A node is far less likely where the drafter proposes only other tokens; the record says how much.
        """
        self._drafted, self.shared, self.odds_beside = {}, {}, []
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            self._drafted.setdefault(parent, {}).setdefault(token, node)
        twins, reached = {-1: -1}, {-1: 1.0}
        for node, (token, parent) in enumerate(zip(self.tokens[:most], self.parents, strict=False)):
            others, odds = self._drafted.get(twins.get(parent, _NOWHERE), {}), self.odds[node]
            if token in others:
                twins[node], reached[node], self.shared[others[token]] = others[token], odds, odds
            elif others:
                reached[node] = reached[parent] * max(place.opposed_odds for place in self._found[node])
            else:
                reached[node] = reached[parent] * odds / (self.odds[parent] if parent >= 0 else 1.0)
            self.odds_beside.append(0.0 if node in twins else reached[node])

    def branches(self, most: int, least_prob: float) -> Branches:
        """List the best nodes. Those below `least_prob` that carry no better one get no probability.

        Nodes that the drafter has, too, are kept, for a policy may cut the drafter's tree short.
        """
        count = min(most, len(self.grow(most).tokens))
        beside = self.odds if self.odds_beside is None else self.odds_beside
        kept = [odds == 0.0 or odds >= least_prob for odds in beside[:count]]
        for node in range(count - 1, -1, -1):
            if kept[node] and self.parents[node] >= 0:
                kept[self.parents[node]] = True
        probs = [odds if is_kept else 0.0 for odds, is_kept in zip(self.odds, kept, strict=False)]
        return Branches(self.tokens[:count], self.parents[:count], probs, self.proposers[:count])

    def judge(self, tokens: Sequence[int]) -> None:
        """Learn from the tokens that the text went on with, whether or not they were proposed."""
        matches = self._matches
        for token in tokens:
            matches = [below for match in matches for below in match.judge(token)]

    def judge_beside(self, tokens: Sequence[int]) -> None:
        """Learn how often the nodes were right that the drafter beside them lacked."""
        matches, twin = self._matches, -1
        for token in tokens:
            drafted = self._drafted.get(twin)
            if not drafted:
                return
            matches = [below for match in matches for below in match.judge_beside(token, drafted)]
            twin = drafted.get(token, _NOWHERE)


def _matches(corpus: Corpus, context: bytes) -> list[_Occurrences]:
    """Find the places that end like the text, by the longest match and by shorter ones that have more places."""
    searches = [(part, part.search(context)) for part in corpus.parts]
    length = max((search.longest for _, search in searches), default=0)
    found, known = list[_Occurrences](), 0
    while length and len(found) < _MATCHES and known < _MOST_PLACES:
        places = list[Place]()
        for part, search in searches:
            if search.longest >= length and len(places) < _MOST_PLACES:
                tokens, count = part.tokens, len(part.tokens)
                places += [(tokens, position, count) for position in search.run(length, _MOST_PLACES)]
        places = places[:: -(-len(places) // _MOST_PLACES)]
        if len(places) > known:
            found.append(_Occurrences(corpus, length, 0, places))
            known = len(places)
        length //= 2
    return found
