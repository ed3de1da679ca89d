"""Total tokens over total seconds: draft a node only while its expected gain is above its cost.

A node is worth its probability of acceptance, in tokens. A second costs lambda tokens: the rate of the sequence so far
(the method for a ratio of sums of Dinkelbach, "On Nonlinear Fractional Programming", Management Science 13, 1967), but
at most twice the rate of plain steps. Copied text runs at ten times that rate; at such a price the head would not be
asked for a long time after it. Step costs and the calibration of the head's scores are learned while decoding, from a
start that may be fitted or measured beforehand.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from operator import mul
from typing import Any, Self

from torch import Tensor, tensor

from ..telemetry.report import StepRecord
from ..tree import TreeShape
from .acceptance_model import LEVELS, AcceptanceModel, PlattScaling
from .costs import RunningCosts
from .decisions import MAX_NODES
from .identity import Identity, check_identity_values
from .policy import Level, Observation
from .saving import SavedPolicy, check_known


_MEMORY = 0.95  # weight of the past when an outcome is added
_MAX_RATE = 2.0  # limit of lambda, in plain rates: in replay as good as none, and 1 to 8% better after copied text
_HOPE = 0.5  # assumed gain of asking a head that was never asked, in tokens per step
_NEWEST = 0.15  # weight of the newest step in what asking gains
_FIRST_PROBE, _LAST_PROBE = 8, 128  # steps between probes_head at a head that does not pay
_MAX_LOOKED_UP = 16  # nodes
_MAX_FITTED = 1000.0  # magnitude of a fitted number; fits stay below 10
_PRICED = 8  # steps for which a list of prices is reused: reading them every time takes a third of a decision


class ThroughputPolicy(SavedPolicy):
    """Picks drafters, depth and size of every step to write the most tokens per second.

    It estimates acceptance and costs while it decodes, and keeps the estimates between calls of `generate`. Use an
    instance for one call at a time.

    Args:
        depth: maximum number of drafted levels.
        top_k: children per node.
        most_nodes: maximum number of nodes from the head, below 4096.
        costs: known costs of this machine in seconds, as from `CostTable.running`; `None` learns them from the first
            steps.
        odds: calibration of the head's scores, as from `trainers.fitted_policy`; `None` learns it while decoding.
        target: identity of the target that it was fitted with; `None` accepts any target.
        head: likewise of the head.

    Raises:
        ValueError: an argument has another type or is out of range.
    """

    policy_type = "throughput"
    needs_head = False
    costs: RunningCosts
    probes_head = True  # learns from one drafted level, whether or not any of it is verified

    def __init__(
        self,
        depth: int = 5,
        top_k: int = 4,
        most_nodes: int = 16,
        costs: RunningCosts | None = None,
        odds: AcceptanceModel | None = None,
        *,
        target: Identity | None = None,
        head: Identity | None = None,
    ) -> None:
        if not isinstance(most_nodes, int) or isinstance(most_nodes, bool) or not 0 <= most_nodes < MAX_NODES:
            raise ValueError(
                f"ThroughputPolicy got `most_nodes={most_nodes!r}`, but it must be an integer from 0 to "
                f"{MAX_NODES - 1}. Leave it out for 16."
            )
        if not isinstance(costs, RunningCosts | None) or not isinstance(odds, AcceptanceModel | None):
            raise ValueError(
                f"`ThroughputPolicy` needs `RunningCosts` and `AcceptanceModel` (or None), got costs={costs!r} and "
                f"odds={odds!r}. Pass `table.running(context)` of a `CostTable` as `costs`, or leave both out."
            )
        check_identity_values("target", target)
        check_identity_values("head", head)
        self.target_identity, self.head_identity = target, head
        self.costs = costs or RunningCosts()
        self.odds = odds or AcceptanceModel()
        self._asked = TreeShape(most_nodes + 1, depth, top_k)
        self._emitted, self._seconds = 0.0, 0.0  # decayed sums; their ratio is lambda
        self._gains = [_HOPE, _HOPE]  # mean gain of asking the head, after a step it predicted nothing of, or some
        self._foresaw = True
        self._probe_in, self._probe_every = 0, _FIRST_PROBE
        self._lookup, self._lookup_hit = 0, 0.0  # nodes of this step that come from the lookup; is the first right?
        self._masses: list[list[float]] = []  # of each row: those of the levels drafted in this step
        self._nodes: list[float] = []  # odds of the nodes that got children, best first
        self._width = 0  # nodes of the first level
        self._verifying: list[float] = []  # seconds of verifying 1, 2, ... nodes
        self._priced_for = self._priced_sizes = 0  # steps more; how many sizes of tree had been measured
        self._rate = 0.0  # lambda in this step
        self._urgency: Sequence[float] = ()  # of each row

    def __repr__(self) -> str:
        return f"ThroughputPolicy(depth={self._asked.depth}, top_k={self._asked.top_k})"

    @property
    def rate(self) -> float:
        """Tokens per second so far (lambda), at least the rate of plain steps and at most twice that."""
        plain = self.costs.step_seconds(1, 0)
        rate = self._emitted / self._seconds if self._seconds > 0 else 0.0
        return min(max(rate, 1.0 / plain), _MAX_RATE / plain) if plain > 0 else rate

    @property
    def is_confident(self) -> bool:
        """Whether its estimates rest on observed outcomes."""
        return self.odds.rest_on_outcomes

    def choose(self, observation: Observation) -> TreeShape:
        self._lookup, self._lookup_hit, self._masses, self._nodes = 0, 0.0, [], []
        self._urgency = observation.row_weights
        if not self.costs.knows_plain or observation.room <= 1:
            return TreeShape.plain()
        self._rate = self.rate
        self._read_prices()
        prefix_accept_probs = observation.prefix_accept_probs()[: observation.room - 1]
        self._lookup, _ = self._best_prefix(prefix_accept_probs, 1)
        if self._lookup:
            self._lookup_hit = prefix_accept_probs[0]
        if observation.features is None or not self._asks_head():
            return TreeShape(1, 0, 1, self._lookup)
        # In a batch nodes are expensive: with four rows, chains are the fastest of our trees
        self._width = max(self._asked.top_k // len(observation.features), 1)
        return TreeShape(self._asked.total_tokens, self._asked.depth, self._width, self._lookup)

    def grow(self, level: Level) -> bool:
        """Draft another level if the expected gain of its nodes is above the cost of drafting them."""
        if level.depth == 1:
            self._width = level.scores.shape[-1]
        left = 1.0 - self._lookup_hit
        odds = self._odds_of(level.scores, level.depth)
        children = self.odds.children_of(odds, level.depth, self._width)
        self._nodes = sorted(self._nodes + [left * node for node in odds], reverse=True)
        coming = sorted(self._nodes + [left * node for node in children], reverse=True)
        before = 1 + self._lookup
        gain = self._best_prefix(coming, before)[1] - self._best_prefix(self._nodes, before)[1]
        return gain > self._rate * self.costs.draft_seconds(1)

    def size(self, scores: Tensor, levels: Tensor) -> int:
        rows, level_of = scores.tolist(), levels.tolist()
        bounds = [bisect_right(level_of, level) for level in range(level_of[-1] + 1)]
        ranked: list[list[float]] = []
        self._masses = []
        for row in rows:
            nodes: list[tuple[float, float]] = []
            masses = []
            for level, (start, stop) in enumerate(pairwise(bounds), start=1):
                worth = self.odds.of(row[start:stop], level)
                masses.append(min(sum(worth), 1.0))
                nodes += [node for node in zip(row[start:stop], worth, strict=True) if node[1]]
            nodes.sort(reverse=True)
            ranked.append([worth for _, worth in nodes[: self._asked.total_tokens - 1]])
            self._masses.append(masses)
        mean = ranked[0] if len(rows) == 1 else self._mean_worth(ranked)
        left = 1.0 - self._lookup_hit
        count, gain = self._best_prefix([left * node for node in mean], 1 + self._lookup)
        self._note_gain(gain - self._rate * self.costs.draft_seconds(len(bounds) - 1))
        return count + 1

    def observe(self, record: StepRecord) -> None:
        levels = len(self._masses[0]) if record.shape.asks_head and self._masses else 0
        times = (record.verify_seconds, record.draft_seconds, record.step_seconds)
        self.costs.add(record.verified, levels, *times, rows=record.decoded_rows)
        self._emitted = self._emitted * _MEMORY + record.mean_emitted
        self._seconds = self._seconds * _MEMORY + max(record.step_seconds, 0.0)
        if levels:
            self._learn(record)

    def _learn(self, record: StepRecord) -> None:
        """Learn from the outcome of every row of a ragged batch; rows in lockstep have one outcome together."""
        matches, emitted = record.drafted_match, record.emitted
        if len(matches) == 1:
            outcomes = [(matches[0], min(filter(None, emitted), default=0))]
            masses = [_means(self._masses)]
        else:
            outcomes = [(found, count) for found, count in zip(matches, emitted, strict=True) if count]
            masses = self._masses
        for expected, outcome in zip(masses, outcomes, strict=True):
            self.odds.learn(expected, *outcome)
        self._foresaw = 2 * sum(found > 0 for found, _ in outcomes) > len(outcomes)

    def _odds_of(self, scores: Tensor, level: int) -> list[float]:
        """Mean over the rows of the odds of `[b, k]` nodes."""
        rows = [self.odds.of(row, level) for row in scores.tolist()]
        return rows[0] if len(rows) == 1 else self._mean_worth(rows)

    def _mean_worth(self, rows: list[list[float]]) -> list[float]:
        """Means over the rows' first nodes, second nodes and so on, weighted by the rows' row_weights."""
        weights = self._urgency or [1.0] * len(rows)
        return [sum(map(mul, weights, column)) / len(rows) for column in zip_longest(*rows, fillvalue=0.0)]

    def _read_prices(self) -> None:
        self._priced_for -= 1
        if self._priced_for <= 0 or self.costs.sizes != self._priced_sizes:
            most = self._asked.total_tokens + _MAX_LOOKED_UP
            self._verifying = [self.costs.verify_seconds(nodes) for nodes in range(1, most + 1)]
            self._priced_for, self._priced_sizes = _PRICED, self.costs.sizes

    def _best_prefix(self, worth: Sequence[float], nodes_before: int) -> tuple[int, float]:
        """How many of the nodes, worth `worth` tokens each, to add to `nodes_before` others; their net gain."""
        rate, seconds = self._rate, self._verifying[nodes_before - 1 :]
        gain, best_gain, best = rate * seconds[0], 0.0, 0
        for count, (value, total) in enumerate(zip(worth, seconds[1:], strict=False), start=1):
            gain += value
            if gain - rate * total > best_gain:
                best_gain, best = gain - rate * total, count
        return best, best_gain

    def _note_gain(self, gain: float) -> None:
        """Note the estimated gain of asking the head, in tokens. It is less noisy than outcomes, which correct it."""
        self._gains[self._foresaw] += _NEWEST * (gain - self._gains[self._foresaw])

    def _asks_head(self) -> bool:
        """Whether asking the head pays after a step like the last one, or is due for another try."""
        if self._gains[self._foresaw] * (1.0 - self._lookup_hit) > 0:
            self._probe_every = self._probe_in = _FIRST_PROBE
            return True
        self._probe_in -= 1
        if self._probe_in > 0 or self._lookup:
            return False
        self._probe_every = min(2 * self._probe_every, _LAST_PROBE)
        self._probe_in = self._probe_every
        return True

    def to_config(self) -> dict[str, Any]:
        shape = self._asked
        sizes = {"depth": shape.depth, "top_k": shape.top_k, "most_nodes": shape.total_tokens - 1}
        identity = {"target": self.target_identity, "head": self.head_identity}
        return sizes | {name: dict(known) for name, known in identity.items() if known is not None}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the fitted calibration. What was learned while decoding is not saved."""
        return {"odds": tensor([[one.intercept, one.slope] for one in self.odds.maps])}

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        check_known(cls.policy_type, config, ("depth", "top_k", "most_nodes", "target", "head"))
        return cls(**config, odds=_read_odds(tensors.get("odds")))


def _read_odds(saved: Tensor | None) -> AcceptanceModel:
    """Read an intercept and a slope for each level.

    Raises:
        ValueError: the tensor holds anything else.
    """
    has_shape = saved is not None and tuple(saved.shape) == (LEVELS, 2)
    rows = saved.tolist() if saved is not None and has_shape else []
    is_bounded = all(isinstance(value, float) and abs(value) <= _MAX_FITTED for row in rows for value in row)
    if not has_shape or not is_bounded:
        came = "no tensor `odds`" if saved is None else f"`odds` {rows or f'of shape {list(saved.shape)}'}"
        raise ValueError(
            f"The weights of a throughput policy hold {came}, but must hold an intercept and a slope for each of "
            f"{LEVELS} levels, none beyond {_MAX_FITTED:g}. Download or save the policy again."
        )
    return AcceptanceModel([PlattScaling(intercept, slope) for intercept, slope in rows])


def _means(ranked: list[list[float]]) -> list[float]:
    """Means over the rows' first nodes, second nodes and so on."""
    return [sum(column) / len(ranked) for column in zip_longest(*ranked, fillvalue=0.0)]
