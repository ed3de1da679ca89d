"""Total tokens over total seconds: draft a node only while its expected gain is above its cost.

A node is worth its probability of acceptance, in tokens; a second costs lambda tokens, the rate of the text so far
(Dinkelbach's method for a ratio of sums; DESIGN.md section 5, decision 8). Everything is learned while decoding.
"""

from torch import Tensor

from ..telemetry import StepRecord
from ..tree import TreeShape
from .costs import RunningCosts
from .protocol import Level, Observation, Policy


_MEMORY = 0.95  # how much of the past an outcome leaves standing
_NEXT_LEVEL = 0.6  # share of a level's probability that its children inherit
_HOPED_GAIN = 1.0  # tokens per step from a head that was never asked
_FIRST_PROBE, _LAST_PROBE = 8, 128  # steps between attempts with a head that does not pay


class ThroughputPolicy(Policy):
    """Decides sources, depth and nodes of every step from running estimates.

    Args:
        depth: most levels to draft.
        top_k: children per node.
        most_nodes: most nodes from the head.
        costs: what is known of this machine, as from `CostTable.running`; learned from the first steps when `None`.
    """

    needs_head = False

    def __init__(
        self, depth: int = 5, top_k: int = 4, most_nodes: int = 16, costs: RunningCosts | None = None
    ) -> None:
        self.costs = costs or RunningCosts()
        self._asked = TreeShape(most_nodes + 1, depth, top_k)
        self._emitted, self._seconds = 0.0, 0.0  # decayed sums; their ratio is lambda
        self._head_accepted, self._head_predicted = 1.0, 1.0  # decayed sums; their ratio corrects the head's scores
        self._head_gain = _HOPED_GAIN  # mean accepted tokens of a step that asked the head alone
        self._probe_in, self._probe_every = 0, _FIRST_PROBE
        self._lookup = 0  # nodes of this step that come from the lookup
        self._levels = 0
        self._predicted = 0.0

    def __repr__(self) -> str:
        return f"ThroughputPolicy(depth={self._asked.depth}, top_k={self._asked.top_k})"

    @property
    def rate(self) -> float:
        """Lambda: tokens per second so far."""
        return self._emitted / self._seconds if self._seconds > 0 else 0.0

    def choose(self, observation: Observation) -> TreeShape:
        self._lookup = self._levels = 0
        if not self.costs.knows_plain or observation.room <= 1:
            return TreeShape.plain()
        survival = observation.survival()[: observation.room - 1]
        self._lookup = self._best_prefix(survival, 1)
        asks_head = observation.features is not None and self._head_pays(survival[0] if self._lookup else 0.0)
        if not asks_head:
            return TreeShape(1, 0, 1, self._lookup)
        self._levels = 1
        return TreeShape(self._asked.total_tokens, self._asked.depth, self._asked.top_k, self._lookup)

    def grow(self, level: Level) -> bool:
        gain = float(level.scores.exp().sum(-1).mean()) * self._correction * _NEXT_LEVEL
        pays = gain > self.rate * self.costs.draft(1)
        self._levels += pays
        return pays

    def size(self, scores: Tensor) -> int:
        likely = scores.exp().topk(min(self._asked.total_tokens - 1, scores.shape[-1]), dim=-1).values.mean(0)
        worth = [value * self._correction for value in likely.tolist()]
        nodes = self._best_prefix(worth, 1 + self._lookup)
        self._predicted = sum(likely.tolist()[:nodes])
        return nodes + 1

    def observe(self, record: StepRecord) -> None:
        emitted = record.emitted_total
        self.costs.add(record.verified, self._levels, record.verify_seconds, record.draft_seconds, record.step_seconds)
        self._emitted = self._emitted * _MEMORY + emitted
        self._seconds = self._seconds * _MEMORY + max(record.step_seconds, 0.0)
        if record.shape.asks_head and not record.shape.lookup:
            self._learn_head(record.mean_emitted - 1.0)

    def _learn_head(self, accepted: float) -> None:
        self._head_gain = 0.9 * self._head_gain + 0.1 * accepted
        self._head_accepted = self._head_accepted * _MEMORY + accepted
        self._head_predicted = self._head_predicted * _MEMORY + self._predicted

    @property
    def _correction(self) -> float:
        """Accepted over predicted: heads are too sure of themselves."""
        return (self._head_accepted + 1.0) / (self._head_predicted + 1.0)

    def _best_prefix(self, worth: list[float], nodes_before: int) -> int:
        """How many of the nodes, worth `worth` tokens each, to add to `nodes_before` others."""
        base, gain, best_gain, best = self.costs.verify(nodes_before), 0.0, 0.0, 0
        for count, value in enumerate(worth, start=1):
            gain += value
            net = gain - self.rate * (self.costs.verify(nodes_before + count) - base)
            if net > best_gain:
                best_gain, best = net, count
        return best

    def _head_pays(self, lookup_hit: float) -> bool:
        """Whether the head is worth its time when the lookup's first token is right with probability `lookup_hit`."""
        nodes = 1 + self._lookup
        levels = max(1, min(self._asked.depth, round(self._head_gain) + 2))
        seconds = self.costs.draft(levels) + self.costs.verify(nodes + 2 * levels) - self.costs.verify(nodes)
        if self._head_gain * (1.0 - lookup_hit) > self.rate * seconds:
            self._probe_every, self._probe_in = _FIRST_PROBE, _FIRST_PROBE
            return True
        self._probe_in -= 1
        if self._probe_in <= 0 and not self._lookup:
            self._probe_every = min(2 * self._probe_every, _LAST_PROBE)
            self._probe_in = self._probe_every
            return True
        return False
