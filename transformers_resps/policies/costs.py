"""What a step costs, by its size and context: the interface of tables, measured or planted.

Costs of a step, learned while decoding: seconds of the target's forward by nodes, of the head by levels.

Machines have slow moments, and only a few sizes are measured in each. If every size kept the time of its own moment,
a
tree that was slow once would look expensive until it is tried again, and would therefore not be tried again. So each
measurement rescales all sizes.
"""

import bisect
from abc import ABC, abstractmethod

from ..tree import TreeShape


class CostModel(ABC):
    """Seconds of the parts of a step.

    Attributes:
        overhead: seconds of a step outside its forwards: acceptance, caches, policy.
    """

    overhead: float

    @abstractmethod
    def verify_seconds(self, nodes: int, context: int) -> float:
        """Seconds of a target forward over `nodes`, after `context` positions."""

    @abstractmethod
    def draft_seconds(self, width: int, levels: int) -> float:
        """Seconds of drafting `levels` levels of `width` nodes."""

    def step_seconds(self, shape: TreeShape, context: int) -> float:
        """Seconds of a whole step: drafting, the target's forward over all nodes, and the overhead."""
        verify = self.verify_seconds(shape.total_tokens + shape.lookup, context)
        return self.draft_seconds(shape.top_k, shape.depth) + verify + self.overhead


# Weights of a surprise (measured over expected seconds, minus one): for the machine's speed, and for this size alone.
_SPEED, _OWN = 0.3, 0.1
INTERRUPTED = 1.5  # times the known duration: what is above is attributed to other processes
_HIGHER, _LOWER = 0.15, 0.5  # weight of a new measurement above or below the mean
_OUTDATED_PLAIN = 0.6  # times a plain step: a tree faster than this shows that the plain time is outdated
# Guessed cost of a further node, in plain steps: with one row, and added for each further row. Most machines are near
# it. SmolLM2 on two Zen 4 cores: 0.01 for one row, 0.2 in a batch of eight.
_GUESSED_SLOPE, _GUESSED_ROW = 0.04, 0.02
_RUINOUS_SLOPE = 1.2  # in plain steps, per further node: far above every machine that we know
_ROUNDING = 1e-9  # seconds


class RunningCosts:
    """Exponential means of measured seconds, interpolated between the node counts that were seen.

    A larger tree is never cheaper than a smaller one, but a plain step may cost more than a small tree: without a
    mask, attention takes another code path, which is slower on CPUs for long sequences (SmolLM2 after 768 positions:
    47 ms for a plain step, 39 ms for four nodes).
    """

    def __init__(self) -> None:
        self._verify: dict[int, float] = {}  # nodes -> seconds of the target's forward
        self._trees: list[int] = []  # the keys above 1, ascending
        self._draft: dict[int, float] = {}  # levels asked for -> seconds of drafting
        self._asked: dict[int, float] = {}  # what `verify_seconds` answered since the last measurement
        self._rest = 0.0  # seconds of everything else in a step
        self._guessed_slope = _GUESSED_SLOPE

    def expect(self, verify: dict[int, float], level_seconds: float, rest_seconds: float = 0.0) -> None:
        """Start from a cost table: nodes -> seconds of the target's forward; seconds of a head level, and the rest."""
        for nodes, seconds in verify.items():
            self.add(nodes, 0, seconds, 0.0, seconds)
        if level_seconds > 0:
            self._draft[1] = level_seconds
        self._rest = rest_seconds

    def add(
        self,
        nodes: int,
        levels: int,
        verify_seconds: float,
        draft_seconds: float,
        step_seconds: float,
        *,
        rows: int = 1,
    ) -> None:
        """Learn from one step of `rows` rows. Negative times, from a clock that was set back, are ignored."""
        rest = step_seconds - verify_seconds - draft_seconds
        if min(verify_seconds, draft_seconds) < 0.0 or rest < -_ROUNDING:
            return
        self._guessed_slope = _GUESSED_SLOPE + _GUESSED_ROW * (rows - 1)
        self._time(nodes, verify_seconds)
        if levels:
            self._draft[levels] = _mean(self._draft.get(levels), draft_seconds)
        self._rest = _mean(self._rest or None, max(rest, 0.0))

    def _time(self, nodes: int, seconds: float) -> None:
        known = self._verify.get(nodes, 0.0)
        if known > 0.0:
            surprise = self.uninterrupted(nodes, seconds) / known - 1.0
            self.rescale(1.0 + _SPEED * surprise)
            self._verify[nodes] = newest = self._verify[nodes] * (1.0 + _OWN * surprise)
        else:
            if nodes > 1 and nodes not in self._verify:
                bisect.insort(self._trees, nodes)
            self._asked.clear()
            self._verify[nodes] = newest = seconds
        if nodes > 1:
            if newest < _OUTDATED_PLAIN * self._verify.get(1, 0.0):
                self._verify[1] = newest
            for fewer in self._trees[: self._trees.index(nodes)]:
                self._verify[fewer] = min(self._verify[fewer], newest)

    def uninterrupted(self, nodes: int, seconds: float) -> float:
        """The `seconds` of a forward over `nodes` that count: at most `INTERRUPTED` times the known duration of that
        size.
        """
        known = self._verify.get(nodes, 0.0)
        return min(seconds, INTERRUPTED * known) if known > 0.0 else seconds

    def rescale(self, factor: float) -> None:
        """All forwards now take `factor` times as long, and so do the differences between them."""
        self._verify = {nodes: seconds * factor for nodes, seconds in self._verify.items()}
        self._asked.clear()

    def copy(self) -> "RunningCosts":
        """The same costs, which from now on learn on their own."""
        copied = RunningCosts()
        copied.go_back_to(self)
        return copied

    def go_back_to(self, earlier: "RunningCosts") -> None:
        """Forget what was learned since `earlier`, a copy of these costs."""
        self._verify, self._trees, self._draft = dict(earlier._verify), list(earlier._trees), dict(earlier._draft)
        self._rest, self._guessed_slope = earlier._rest, earlier._guessed_slope
        self._asked.clear()

    @property
    def sizes(self) -> int:
        """How many node counts were measured."""
        return len(self._verify)

    @property
    def knows_plain(self) -> bool:
        return 1 in self._verify

    @property
    def knows_trees(self) -> bool:
        return len(self._verify) > 1

    @property
    def largest_tree(self) -> int:
        """Nodes of the largest tree that was measured; 1 before any was."""
        return self._trees[-1] if self._trees else 1

    @property
    def knows_head(self) -> bool:
        return bool(self._draft)

    def verify_seconds(self, nodes: int) -> float:
        """Seconds of a forward over `nodes`; of trees never less than over fewer nodes."""
        known = self._asked.get(nodes)
        if known is None:
            known = self._asked[nodes] = self._interpolated(nodes)
        return known

    def _interpolated(self, nodes: int) -> float:
        plain = self._verify.get(1)
        if nodes == 1 and plain is not None:
            return plain
        if nodes in self._verify:
            return max(self._verify[count] for count in self._trees if count <= nodes)
        place = bisect.bisect_left(self._trees, nodes)
        low = self._trees[place - 1] if place else 1
        if place == len(self._trees):
            return (self.verify_seconds(low) if self._verify else 0.0) + (nodes - low) * self._slope()
        high = self._trees[place]
        more = self.verify_seconds(high)
        less = self.verify_seconds(low) if place else min(more if plain is None else plain, more)
        return less + (nodes - low) / (high - low) * (more - less)

    def _slope(self) -> float:
        """Seconds per node beyond the largest tree that was measured."""
        known = self._trees if len(self._trees) > 1 else sorted(self._verify)
        if not known:
            return 0.0
        low, high = known[0], known[-1]
        measured = max(self._verify[high] - self._verify[low], 0.0) / max(high - low, 1)
        if high - low < 4 and measured < _RUINOUS_SLOPE * self._verify[low]:
            guessed = self._guessed_slope * self._verify[low]
            return guessed if low == 1 else max(guessed, measured)  # after a plain step a mask alone may cost as much
        return measured

    def draft_seconds(self, levels: int) -> float:
        """Seconds of drafting `levels`; proportional to the nearest depth that was measured, 0 before any was."""
        if not self._draft or levels == 0:
            return 0.0
        nearest = min(self._draft, key=lambda known: abs(known - levels))
        return self._draft[nearest] * levels / nearest

    def step_seconds(self, nodes: int, levels: int) -> float:
        """Seconds of a whole step."""
        return self.verify_seconds(nodes) + self.draft_seconds(levels) + self._rest


def _mean(old: float | None, new: float) -> float:
    if old is None:
        return new
    weight = _LOWER if new < old else _HIGHER
    return old + weight * (new - old)
