"""Build a tree of likely next tokens from places where this or another text contains the text's last tokens.

As in SuffixDecoding (arXiv 2411.04975, section 4), the likeliest node is added first. The "odds" of a token are the
probability that it is right, estimated from earlier tokens with similar match lengths and shares of places.
"""

from array import array
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from heapq import heappop, heappush
from operator import or_

from ..tree import Branches, followed
from .suffixes import SEPARATOR, Suffixes


LONGEST_DRAFT = 16  # Maximum number of levels of a tree.
_MOST_PLACES = 24  # Maximum number of places that are examined for a match length.
_MATCHES = 3  # Maximum number of match lengths that are used: the longest one, half of it, and so on.
_LEAST_SHARE = 1 / 16  # Minimum share of the places at which a proposed token followed.
_LEAST_ODDS = 0.02  # Minimum odds of a node.
_LENGTHS = (1, 2, 3, 4, 6, 9, 14)  # The shortest match length in each class of match lengths.
# Acceptance rates that are assumed before any outcome is recorded, measured on texts like those of the benchmarks:
_ONCE = (0.3, 0.35, 0.4, 0.45, 0.55, 0.8, 0.85)  # of a token that followed at the only place, by match length;
_ALWAYS = (0.7, 0.7, 0.7, 0.75, 0.8, 0.9, 0.95)  # of a token that followed at all of several places, by match length;
_SHARES, _PARTLY = (0.125, 0.25, 0.5), (0.04, 0.1, 0.18, 0.3)  # of a token at some of them, by their share;
_ODDS, _OPPOSED = (0.1, 0.2, 0.4, 0.7, 0.9), (0.01, 0.03, 0.06, 0.2, 0.4, 0.7)  # by odds: see `opposed_class`.
_SUM = -1  # Index of a record's class for whole trees: its rate is the number of right nodes over the sum of odds.
_NOWHERE = -2  # Index of a node that the other drafter did not propose.
_PRIOR_WEIGHT = 4.0  # Number of outcomes that an assumed rate counts for.
_MEMORY = 0.98  # Factor on the weight of all earlier outcomes when an outcome is recorded.


def length_class(length: int) -> int:
    """Return the index of the range in `_LENGTHS` that contains a match length; `length` must be at least 1."""
    return bisect_right(_LENGTHS, length) - 1


class TrackRecord:
    """Tracks how often predictions of each class were right. Recent outcomes weigh more.

    `priors` are, for each class, the rate of right predictions that is assumed before any outcome is recorded.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self._right = [rate * _PRIOR_WEIGHT for rate in priors]
        self._tried = [_PRIOR_WEIGHT] * len(priors)

    def rate(self, index: int) -> float:
        """Estimate the probability that a prediction of the class `index` is right."""
        return self._right[index] / self._tried[index]

    def add(self, index: int, right: float, tried: float = 1.0) -> None:
        """Record that `right` of `tried` predictions of class `index` were right; `tried` may be a sum of odds."""
        self._right[index] = self._right[index] * _MEMORY + right
        self._tried[index] = self._tried[index] * _MEMORY + tried


def match_record() -> TrackRecord:
    """Make a record for looked-up tokens, whose classes combine a range of match lengths and a share of the places."""
    priors = zip(_ONCE, _ALWAYS, strict=True)
    rates = [rate for once, always in priors for rate in (once, always, (1 + always) / 2, *_PARTLY)]
    return TrackRecord([*rates, *_OPPOSED, 1.0])  # the last classes: tokens that another drafter opposes, and `_SUM`


def _class_of(length: int, count: int, places: int) -> int:
    if count == places:
        evidence = 0 if places == 1 else 1 if places < 4 else 2
    else:
        evidence = 3 + bisect_right(_SHARES, count / places)
    return length_class(length) * 7 + evidence


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to search, and a record of how often tokens found in them were right."""

    parts: Sequence[Suffixes]  # the texts, which may grow between two searches
    record: TrackRecord  # how often tokens found in these texts were right, by class of evidence
    proposer: int  # the flag in `DraftTree.proposers` of nodes found in these texts


# The tokens of a searched text, the position after a match in this text, and its length at the time of the search.
Place = tuple["array[int]", int, int]


class _Occurrences:
    """Places in one corpus where the text's last tokens occur, all followed by the same `depth` tokens.

    `length` counts all matched tokens, these included. `odds` of the last token are the rate of the class `index`.
    """

    __slots__ = ("_class", "_depth", "_followers", "_length", "_places", "corpus", "odds")

    def __init__(self, corpus: Corpus, length: int, depth: int, places: Sequence[Place], index: int = 0) -> None:
        self.corpus, self._length, self._depth, self._places = corpus, length, depth, places
        self._class, self.odds = index, corpus.record.rate(index)
        self._followers: dict[int, _Occurrences] | None = None

    @property
    def opposed_class(self) -> int:
        """Class of the last token in the corpus's record if another drafter proposes only other tokens here."""
        return bisect_right(_ODDS, self.odds) - len(_OPPOSED) + _SUM

    def followers(self) -> "dict[int, _Occurrences]":
        """Map each possible next token to the places where it follows; omit tokens that follow too rarely."""
        if self._followers is not None:
            return self._followers
        found: dict[int, list[Place]] = {}
        for place in self._places:
            tokens, position, count = place
            at = position + self._depth
            if at >= count:  # at the end of the searched text: go on as if the tokens after the match were repeated
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

    def judge(self, token: int, drafted: Collection[int] = ()) -> "list[_Occurrences]":
        """Record for each token in `followers` whether it is the text's next `token`; return a list of that token's
        occurrences, or an empty list. If another drafter proposed the tokens `drafted` here, only other tokens are
        recorded, in the class `opposed_class`.
        """
        followers = self.followers()
        for own, below in followers.items():
            if own not in drafted:
                self.corpus.record.add(below.opposed_class if drafted else below._class, own == token)
        return [followers[token]] if token in followers else []


class Continuations:
    """A tree of tokens that may follow a text. It grows on demand, by the likeliest node first.

    The `corpora` are searched for the last tokens of `text`. Tokens in `never_drafted` are never proposed. Without
    `branches` the nodes are a chain of the likeliest tokens.
    """

    def __init__(
        self,
        text: Suffixes,
        corpora: Sequence[Corpus],
        never_drafted: Collection[int] = frozenset(),
        *,
        branches: bool = True,
    ) -> None:
        self.tokens = list[int]()  # of each node, every parent before its children
        self.parents = list[int]()  # of each node; -1 is the text's end
        self.odds = list[float]()  # probability of the whole path to each node, in descending order
        self.proposers = list[int]()  # flags of the corpora in which each node was found
        self._never_drafted, self._branches = never_drafted, branches
        context = text.context
        self._matches = [match for corpus in corpora for match in _matches(corpus, context)]
        # A token found in several corpora gets its highest odds, so their sum is too high: scale it by `_SUM`'s rate
        self._sums = corpora[-1].record if len(corpora) > 1 else None
        self._share = 1.0 if self._sums is None else min(max(self._sums.rate(_SUM), _LEAST_ODDS), 1.0)
        self._ends = len(text) > 0 and text.tokens[-1] in never_drafted
        self._heap: list[tuple[float, int, int, int, int, list[_Occurrences]]] | None = None
        self._pushed = 0
        self._found = list[list[_Occurrences]]()  # for each node, the places where it follows
        self._drafted: dict[int, dict[int, int]] = {}  # the other drafter's node -> its children's tokens -> nodes
        # For each node, 0 if another drafter proposed it, too, else its probability given that drafter's proposals.
        self.odds_beside: list[float] | None = None  # `None` before `weigh_beside`
        self.shared: dict[int, float] = {}  # the other drafter's nodes that are also in this tree -> their `odds`

    def grow(self, most: int) -> "Continuations":
        """Grow the tree to `most` nodes, or to all possible nodes if there are fewer, and return it."""
        if self._heap is None:
            self._heap = []
            if not self._ends:
                self._push(self._matches, -1, 1.0, 1)
        while self._heap and len(self.tokens) < most:
            odds, _, token, parent, level, found = heappop(self._heap)
            self.tokens.append(token)
            self.parents.append(parent)
            self.odds.append(-odds * self._share)
            self.proposers.append(reduce(or_, {match.corpus.proposer for match in found}))
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
        """Compare the `most` best nodes with another drafter's nodes, and set `odds_beside` and `shared`.

        `tokens` and `parents` list the other drafter's nodes; a parent of -1 is the text's end. If the other
        drafter proposes only other tokens in a node's place, the node is far less likely: see `opposed_class`.
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
                opposed = [place.corpus.record.rate(place.opposed_class) for place in self._found[node]]
                reached[node] = reached[parent] * max(opposed)
            else:
                reached[node] = reached[parent] * odds / (self.odds[parent] if parent >= 0 else 1.0)
            self.odds_beside.append(0.0 if node in twins else reached[node])

    def branches(self, most: int, least_prob: float) -> Branches:
        """Return the `most` best nodes. The probability of each node whose odds are below `least_prob` is set to 0.

        Exceptions are ancestors of nodes that are likely enough, and nodes that `weigh_beside` found in the other
        drafter's tree, since a policy may remove them from that tree.
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
        """Record which continuations agree with the text's next `tokens`, even continuations that no step used."""
        matches = self._matches
        for token in tokens:
            matches = [below for match in matches for below in match.judge(token)]

    def judge_sum(self, tokens: Sequence[int]) -> None:
        """Record how many of the tree's nodes agree with the text's next `tokens`, and the sum of the nodes' odds."""
        if self._sums is None or not self.tokens or not tokens:
            return
        path, promised = followed(self.tokens, self.parents, tokens, -1), 0.0
        unknown = set(path[-1:]) if len(path) == len(tokens) else set[int]()  # this node's descendants
        for node, (parent, odds) in enumerate(zip(self.parents, self.odds, strict=True)):
            if parent in unknown:
                unknown.add(node)
            else:
                promised += odds / self._share
        self._sums.add(_SUM, len(path), promised)

    def judge_beside(self, tokens: Sequence[int]) -> None:
        """Record which nodes agree with the text's next `tokens` where another drafter proposed only other tokens."""
        matches, twin = self._matches, -1
        for token in tokens:
            drafted = self._drafted.get(twin)
            if not drafted:
                return
            matches = [below for match in matches for below in match.judge(token, drafted)]
            twin = drafted.get(token, _NOWHERE)


def _matches(corpus: Corpus, context: bytes) -> list[_Occurrences]:
    """Find in the corpus the longest match of the newest tokens of `context`, and shorter matches at more places."""
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
