"""The policy of "auto": maximises tokens per second by adding the nodes that gain more tokens than their time costs.

A node's gain is its probability of acceptance, in tokens. A second costs `rate` tokens: the recent tokens per second
(Dinkelbach, "On Nonlinear Fractional Programming", Management Science 13, 1967), but at most twice the plain rate.
Without this limit, text that lookup copies at ten times the plain rate would make the head look too expensive for a
long time. Step costs and the calibration of the head's scores are learned while decoding; both may start from values
that were measured or fitted before. The nodes of a block head are chosen as in CaDDTree (arXiv 2606.01813), but all
sizes are compared, because measured costs are not convex.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import inf
from operator import itemgetter
from typing import Any, Self

from torch import Tensor, cat, tensor

from ..telemetry.report import StepRecord
from ..tree import TreeShape
from .acceptance_model import AcceptanceModel, PlattScaling
from .base import MAX_NODES, Identity, Level, Observation, Trials, check_identity_values, mean_odds
from .costs import RunningCosts
from .saving import SavedPolicy, check_known


_MAX_LOOKED_UP = 16  # Most nodes that lookup proposes for a step.
_MAX_FITTED = 1000.0  # Largest magnitude of a saved calibration value; real values stay below 10.
_SAVED_AS = "odds"  # Name of the calibration's tensor in files.
_MEMORY = 0.95  # Factor on the old sums when a step is added: about the last twenty steps count.
_MAX_RATE = 2.0  # Maximum of `rate`, in plain rates: costs nothing in replay, and gains 1 to 8% after copied text.
_FIRST_GAIN = 0.5  # Assumed gain of a head before its first use, in tokens per step.
_LIKELY = 0.5  # A head that does not pay is not probed where lookup is right with a higher probability.
_NEWEST = 0.15  # Weight of the newest draft in the mean gain of the head.
_FIRST_PROBE, _LAST_PROBE = 8, 128  # Steps between probes of a head that does not pay: at first, and at most.
_NEWEST_LOOK = 0.02  # Weight of the newest lookup in its mean gain; small, because a text may repeat itself late.
_FIRST_LOOK, _LAST_LOOK = 2, 8  # Steps between lookups while lookup does not pay: at first, and at most.
_MARGIN = 1.03  # Another width replaces the best width only if its rate is higher by this factor.
_FIRST_TRIAL, _LAST_TRIAL = 8, 256  # Drafted steps between two trials of another width: at first, and at most.
_FIRST_WIDTH = 4  # Children per node on a CPU until more were tried.
_NEWEST_WIDER = 0.1  # Weight of the newest trial in the mean gain of a wider draft.
_PLAIN = TreeShape.plain()


class ThroughputPolicy(SavedPolicy):
    """Picks the drafters, depth and size of every step so that `generate` writes the most tokens per second.

    It learns how likely tokens are accepted and what steps cost while it decodes, and keeps both between calls of
    `generate`. Use an instance for one call at a time.

    Args:
        depth: maximum number of levels; a block head ignores it.
        top_k: maximum number of children per node.
        most_nodes: maximum number of nodes from the head, below 4096.
        costs: known costs of this machine, from `CostTable.running`; `None` learns them from the first steps.
        acceptance: calibration of the head's scores, from `fitted_policy`; `None` learns it while decoding.
        target: identity of the target for which `acceptance` was fitted; `None` accepts any target.
        head: identity of the head for which `acceptance` was fitted; `None` accepts any head.
    """

    policy_type = "throughput"
    costs: RunningCosts
    needs_head = False
    weighs_lookup = True
    probes_head = True  # it learns from a drafted level even if no node of it is verified

    def __init__(
        self,
        depth: int = 8,
        top_k: int = 10,
        most_nodes: int = 64,
        costs: RunningCosts | None = None,
        acceptance: AcceptanceModel | None = None,
        *,
        target: Identity | None = None,
        head: Identity | None = None,
    ) -> None:
        if not isinstance(most_nodes, int) or isinstance(most_nodes, bool) or not 0 <= most_nodes < MAX_NODES:
            raise ValueError(
                f"ThroughputPolicy got `most_nodes={most_nodes!r}`, but it must be an integer from 0 to "
                f"{MAX_NODES - 1}. Leave it out for 64."
            )
        if not isinstance(costs, RunningCosts | None) or not isinstance(acceptance, AcceptanceModel | None):
            raise ValueError(
                f"`ThroughputPolicy` needs `RunningCosts` and `AcceptanceModel` (or None), got costs={costs!r} and "
                f"acceptance={acceptance!r}. Pass `table.running(context)` of a `CostTable` as `costs`, or leave both "
                "out."
            )
        check_identity_values("target", target)
        check_identity_values("head", head)
        self.target_identity, self.head_identity = target, head
        self.costs = costs or RunningCosts()
        self.acceptance = acceptance or AcceptanceModel()
        self._largest = TreeShape(most_nodes + 1, depth, top_k)
        self._memory, self._widths, self._wider = ThroughputMemory(), WidthMemory(top_k), WiderDrafts(top_k)
        self.widths = self._wider.widths  # numbers of children per node that are tried for a single row, ascending
        self._step = _Step()
        self.grows = True

    def __repr__(self) -> str:
        return f"ThroughputPolicy(depth={self._largest.depth}, top_k={self._largest.top_k})"

    @property
    def rate(self) -> float:
        """Price of a second in tokens: the recent tokens per second, limited to one to two times the plain rate."""
        return self._memory.rate(self.costs.step_seconds(_PLAIN, 0))

    @property
    def is_confident(self) -> bool:
        return self.acceptance.is_confident

    def choose(self, observation: Observation) -> TreeShape:
        step, self.discounts = _Step.of(observation), ()
        self._step = step
        if not self.costs.knows_plain or observation.room <= 1:
            return TreeShape.plain()
        step.rate = self.rate
        lookup = self._look_up(observation)
        if not observation.can_draft or not self._memory.asks_head(step.lookup_hit):
            return TreeShape(1, 0, 1, lookup)
        # On an accelerator each decision between two levels would have to wait for the device
        self.grows = observation.device_type == "cpu" and not observation.drafts_at_once
        step.width = self._width(observation)
        if observation.drafts_at_once:
            depth = observation.most_levels or self._largest.depth
            self.discounts = step.discounts = self.acceptance.discounts(depth)
        else:
            depth = self._largest.depth if self.grows else self._planned_depth()
        return TreeShape(self._largest.total_tokens, depth, step.width, lookup)

    def _width(self, observation: Observation) -> int:
        rows, most, paths_cost = observation.row_count, self._largest.top_k, observation.pricing.paths_cost
        step = self._step
        if observation.drafts_at_once and not paths_cost:
            return most
        if rows == 1 and self.grows and not paths_cost:
            width, step.narrower = self._wider.choose()
            return width
        # In a batch nodes are expensive: with four rows, chains are faster than wider trees. Compiled passes take at
        # least two nodes of each row, and ragged rows verify different nodes
        least = 2 if step.is_ragged else 1
        first = min(_FIRST_WIDTH, most) if self.grows and rows > 1 else most
        width = min(max(first // rows, least), most)
        return self._widths.choose(width) if paths_cost else width

    def _look_up(self, observation: Observation) -> int:
        """Run prompt lookup and choose which of its nodes to verify; return the largest number of them in any row."""
        step = self._step
        self.least_lookup_prob = 0.0
        step.has_looked = self._memory.looks_up(step.rate * self.costs.look_seconds)
        if not step.has_looked:
            return 0
        rows = step.odds()
        likely = sorted(((prob, row) for row, own in enumerate(rows) for prob in own), reverse=True)
        worth = [step.factors[row] * prob for prob, row in likely]
        count, gain = self._best_prefix(worth)
        step.looked_up_gain = gain
        gain -= step.rate * self.costs.lookup_seconds
        self._memory.note_look(max(gain, 0.0))
        if gain <= 0.0:
            return 0
        if step.is_ragged or observation.row_count == 1:
            step.competes = True
        self.least_lookup_prob = likely[count - 1][0] if step.is_ragged else 0.0
        chains = [[prob for prob in own if prob >= self.least_lookup_prob] for own in rows]
        chains = chains if step.is_ragged else [rows[0][:count]]
        step.lookup, step.chains = sum(map(len, chains)) * step.price, chains
        step.lookup_hit = sum(sum(own[:1]) for own in chains) / len(chains)
        return max(map(len, chains))

    def _best_prefix(self, worth: Sequence[float], *, from_root: bool = False) -> tuple[int, float]:
        """Return `best_prefix` for nodes added to the chosen looked-up nodes or, if `from_root`, to the root alone."""
        step = self._step
        most = 1 + (self._largest.total_tokens - 1 + _MAX_LOOKED_UP) * step.row_price
        seconds = self.costs.verify_curve(most)[0 if from_root else step.lookup : most : step.price]
        return best_prefix(seconds, worth, step.rate)

    def _best_of_both(self, worth: Sequence[float]) -> tuple[int, float, int]:
        """Choose how many drafted nodes (with `worth` expected tokens) and how many looked-up nodes to verify.

        Returns the number of drafted nodes, their gain on top of looked-up nodes, and the number of looked-up nodes.
        """
        step = self._step
        if not step.competes:
            return *self._best_prefix(worth), 0
        # Merge both lists by expected tokens but keep the order within each list: a parent comes before its children
        falling = list(accumulate(worth, min)), [one for one, _ in step.looked_up]
        order = sorted([(-one, drafted) for drafted, ones in enumerate(falling) for one in ones], key=itemgetter(0))
        left = iter(worth), iter(falling[1])
        count, gain = self._best_prefix([next(left[which]) for _, which in order], from_root=True)
        kept = sum(which for _, which in order[:count])
        return count - kept, gain - step.looked_up_gain, kept

    def _planned_depth(self) -> int:
        """Choose, before drafting, the depth with the highest expected gain, assuming one node per level."""
        step, gains = self._step, list[float]()
        reach = enumerate(self.acceptance.reach(self._largest.depth), start=1)
        worth = [step.left_at(level)[0] * prob for level, prob in reach]
        for depth in range(1, self._largest.depth + 1):
            _, gain = self._best_prefix(worth[:depth])
            gains.append(gain - step.rate * self.costs.draft_seconds(step.width, depth))
        return 1 + gains.index(max(gains))

    def grow(self, level: Level) -> bool:
        """Return whether the nodes of another level gain more tokens than drafting the level costs."""
        step, width = self._step, level.scores.shape[-1]
        probs = step.apart([self.acceptance.probabilities(row, level.depth) for row in level.scores.tolist()])
        children = [self.acceptance.children_of(row, level.depth, width) for row in probs]
        here, below = (step.left_at(depth) for depth in (level.depth, level.depth + 1))
        step.node_worth = sorted(step.node_worth + [worth for worth, _ in step.worth(probs, here)], reverse=True)
        with_children = sorted(step.node_worth + [worth for worth, _ in step.worth(children, below)], reverse=True)
        more, gain = self._best_prefix(with_children)[1], self._best_prefix(step.node_worth)[1]
        return more - gain > step.rate * self.costs.level_seconds(step.width)

    def size(self, scores: Tensor, levels: Tensor) -> int | Sequence[int]:
        step, level_of = self._step, levels.tolist()
        if step.competes:
            self._weigh_again(scores, level_of)
        bounds = [bisect_right(level_of, level) for level in range(level_of[-1] + 1)]
        ranked, step.level_probs = self._rank(scores, bounds)
        count, gain, kept = self._best_of_both([worth for worth, _ in ranked])
        if step.competes:
            self.least_lookup_prob = step.looked_up[kept - 1][1] if kept else inf
        step.expected = sum(worth for worth, _ in ranked[:count])
        price = step.rate * self.costs.draft_seconds(step.width, step.passes(len(bounds) - 1))
        self._memory.note_draft(gain, price, step.lookup_hit)
        if step.narrower and (inner := narrowed(scores, bounds, step.width, step.narrower)) is not None:
            ranked_inside, _ = self._rank(*inner)
            step.wider_gain = gain - self._best_of_both([worth for worth, _ in ranked_inside])[1]
        if not step.is_ragged:
            return count + 1
        chosen = Counter(row for _, row in ranked[:count])
        return [1 + chosen[row] for row in range(len(scores))]

    def _weigh_again(self, scores: Tensor, level_of: list[int]) -> None:
        """Compute lookup's gain again after drafting: nodes that the head also proposes get the head's probability."""
        step = self._step
        alone = [(step.factors[row] * prob, prob) for row, own in enumerate(step.odds()) for prob in own]
        step.looked_up = sorted(alone, reverse=True)
        worth = [one for one, _ in alone]
        for row, node in ((row, node) for row, nodes in enumerate(step.shared()) for node in nodes):
            score, level = float(scores[row, node]) - step.discount(level_of[node]), level_of[node]
            worth.append(step.factors[row] * self.acceptance.probabilities([score], level)[0])
        step.looked_up_gain = self._best_prefix(sorted(worth, reverse=True), from_root=True)[1]

    def _rank(self, scores: Tensor, bounds: Sequence[int]) -> tuple[list[tuple[float, int]], list[list[float]]]:
        """Return (expected tokens, row) of each node, best first, and each row's P(level includes the right path)."""
        step = self._step
        best: list[list[float]] = []
        held: list[list[float]] = []
        for row in scores.tolist():
            nodes: list[tuple[float, float]] = []
            level_probs = []
            for level, (start, stop) in enumerate(pairwise(bounds), start=1):
                added = step.discount(level)
                claimed = [score - added for score in row[start:stop]] if added else row[start:stop]
                probs = self.acceptance.probabilities(claimed, level)
                level_probs.append(min(sum(probs), 1.0))
                nodes += [node for node in zip(row[start:stop], probs, strict=True) if node[1]]
            nodes.sort(reverse=True)
            probs = [prob for _, prob in nodes[: self._largest.total_tokens - 1]]
            best.append(list(accumulate(probs, min)) if step.is_ragged else probs)  # a parent before its children
            held.append(level_probs)
        ranked = step.worth(step.apart(best), step.factors if step.competes else step.left_at(1))
        if step.is_ragged:
            ranked.sort(reverse=True)
        return ranked, held

    def observe(self, record: StepRecord) -> None:
        step, level_probs = self._step, self._step.level_probs
        levels = len(level_probs[0]) if record.shape.asks_head and level_probs else 0
        times = (record.verify_seconds, record.draft_seconds, record.step_seconds)
        looks = {"looks_up": record.verified > 1 and not record.shape.asks_head, "has_looked": step.has_looked}
        passes, rows = step.passes(levels), record.rows_of_a_node
        self.costs.add(record.computed, passes, *times, width=step.width, rows=rows, **looks)
        step.has_looked = False  # a guard may take the next step without asking this policy
        step.odds = step.shared = list  # frees the text to which the callables refer
        self._memory.add(record)
        if step.paths_cost and levels and record.verified > 1:
            self._widths.add(1.0 + step.expected, record.step_seconds)
        if not levels:
            return
        self._learn(record, level_probs)
        if step.wider_gain is not None:  # only now is the price of a wider draft known
            wider, narrower = (self.costs.draft_seconds(width, levels) for width in (step.width, step.narrower))
            self._wider.note(step.wider_gain - step.rate * (wider - narrower))

    def _learn(self, record: StepRecord, level_probs: list[list[float]]) -> None:
        """Update `acceptance` with each row's outcome or, if rows share one outcome in the record, with that one."""
        matches, emitted = record.drafted_match, record.emitted
        if len(matches) == 1:
            outcomes = [(matches[0], min(filter(None, emitted), default=0))]
            level_probs = [[sum(column) / len(level_probs) for column in zip(*level_probs, strict=True)]]
        else:
            outcomes = [(matched, count) for matched, count in zip(matches, emitted, strict=True) if count]
        for expected, outcome in zip(level_probs, outcomes, strict=True):
            self.acceptance.learn(expected, *outcome)
        self._memory.head_was_right = 2 * sum(matched > 0 for matched, _ in outcomes) > len(outcomes)

    def to_config(self) -> dict[str, Any]:
        shape = self._largest
        sizes = {"depth": shape.depth, "top_k": shape.top_k, "most_nodes": shape.total_tokens - 1}
        identity = {"target": self.target_identity, "head": self.head_identity}
        return sizes | {name: dict(known) for name, known in identity.items() if known is not None}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the fitted scalings as a tensor `[levels, 2]`, without the factors learned while decoding."""
        return {_SAVED_AS: tensor([[one.intercept, one.slope] for one in self.acceptance.scalings])}

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        check_known(cls.policy_type, config, ("depth", "top_k", "most_nodes", "target", "head"))
        return cls(**config, acceptance=_read_acceptance(tensors.get(_SAVED_AS)))


def _read_acceptance(saved: Tensor | None) -> AcceptanceModel:
    has_shape = saved is not None and saved.ndim == 2 and len(saved) > 0 and saved.shape[1] == 2
    rows = saved.tolist() if saved is not None and has_shape else []
    is_bounded = all(isinstance(value, float) and abs(value) <= _MAX_FITTED for row in rows for value in row)
    if not has_shape or not is_bounded:
        came = "no tensor `odds`" if saved is None else f"`odds` {rows or f'of shape {list(saved.shape)}'}"
        raise ValueError(
            f"The weights of a throughput policy hold {came}, but must hold an intercept and a slope for each "
            f"level, none beyond {_MAX_FITTED:g}. Download or save the policy again."
        )
    return AcceptanceModel([PlattScaling(intercept, slope) for intercept, slope in rows])


@dataclass(slots=True)
class _Step:
    """The policy's state during a step. Outer lists have an entry per row of a ragged batch, else a single entry."""

    row_weights: Sequence[float] = ()  # see `Observation`
    paths_cost: bool = False  # see `Pricing`
    drafts_at_once: bool = False  # see `Observation`
    row_price: int = 1  # see `Observation.node_price`
    is_ragged: bool = False  # whether each row gets its own number of nodes
    discounts: Sequence[float] = ()  # see `Policy`
    odds: Callable[[], list[list[float]]] = list  # acceptance probabilities of looked-up nodes
    shared: Callable[[], list[list[int]]] = list  # see `Observation`
    factors: list[float] = field(default_factory=lambda: [1.0])  # tokens that a node of probability 1 adds
    rate: float = 0.0  # tokens that a second costs
    has_looked: bool = False  # whether the step called lookup
    lookup: int = 0  # number of nodes that lookup adds to the step's cost
    chains: list[list[float]] = field(default_factory=list)  # probabilities of the chosen looked-up nodes
    competes: bool = False  # whether `size` weighs looked-up nodes against drafted nodes
    looked_up: list[tuple[float, float]] = field(default_factory=list)  # expected tokens and probability, best first
    looked_up_gain: float = 0.0  # gain of the looked-up nodes in tokens
    lookup_hit: float = 0.0  # mean probability that the first looked-up node is right
    width: int = 1  # children per node of this draft
    narrower: int = 0  # smaller width that this draft is compared with; 0 for none
    wider_gain: float | None = None  # tokens gained over the narrower width, before the cost of drafting
    node_worth: list[float] = field(default_factory=list)  # tokens that each drafted node adds to lookup's, falling
    level_probs: list[list[float]] = field(default_factory=list)  # P(each level includes the right path)
    expected: float = 0.0  # tokens that the head's nodes are expected to add

    @classmethod
    def of(cls, observation: Observation) -> "_Step":
        pricing, at_once = observation.pricing, observation.drafts_at_once
        step = cls(observation.row_weights, pricing.paths_cost, at_once, observation.node_price)
        if observation.row_accept_probs is not None:
            step.is_ragged = True
            rows = observation.row_count
            step.factors = [weight / rows for weight in observation.row_weights or [1.0] * rows]
        most, rows_odds, odds = observation.room - 1, observation.row_accept_probs, observation.prefix_accept_probs
        step.shared = observation.shared
        step.odds = lambda: [row[:most] for row in ([odds()] if rows_odds is None else rows_odds())]
        return step

    @property
    def price(self) -> int:
        """Number of nodes that a chosen candidate adds to a step's cost; above 1 if each row of a batch gets it."""
        return 1 if self.is_ragged else self.row_price

    def discount(self, level: int) -> float:
        return self.discounts[min(level, len(self.discounts)) - 1] if self.discounts else 0.0

    def passes(self, levels: int) -> int:
        """Return the number of passes that draft `levels` levels: one for a block head, else one per level."""
        return min(levels, 1) if self.drafts_at_once else levels

    def left_at(self, level: int) -> list[float]:
        """Return, per row, how many tokens an accepted node at `level` adds: `factors` times P(lookup is wrong)."""
        if not self.chains:
            return self.factors
        hits = [chain[level - 1] if level <= len(chain) else 0.0 for chain in self.chains]
        return [factor * (1.0 - hit) for factor, hit in zip(self.factors, hits, strict=True)]

    def apart(self, rows: list[list[float]]) -> list[list[float]]:
        """Return each row's probabilities if the batch is ragged, else their mean over rows as the only entry."""
        return rows if self.is_ragged else [mean_odds(rows, self.row_weights)]

    def worth(self, rows: list[list[float]], factors: list[float]) -> list[tuple[float, int]]:
        """Return (expected tokens, row) of each node: its probability in `rows` times its row's entry in `factors`."""
        return [(factor * prob, row) for row, factor in enumerate(factors) for prob in rows[row]]


def best_prefix(seconds: Sequence[float], worth: Sequence[float], rate: float) -> tuple[int, float]:
    """Choose how many of a list's first nodes to add to a tree; return their number and their net gain in tokens.

    `seconds` are the times to verify the tree with 0, 1, 2, ... of the nodes, `worth` the expected tokens of each
    node, and `rate` the price of a second in tokens.
    """
    gain, best_gain, best = rate * seconds[0], 0.0, 0
    for count, (value, total) in enumerate(zip(worth, seconds[1:], strict=False), start=1):
        gain += value
        if gain - rate * total > best_gain:
            best_gain, best = gain - rate * total, count
    return best, best_gain


def narrowed(scores: Tensor, bounds: Sequence[int], width: int, narrower: int) -> tuple[Tensor, list[int]] | None:
    """Reduce the scores of a draft with `width` children per node to those of a draft with `narrower` children.

    Returns the kept scores and their `bounds`, or `None` if a level lacks `width` children per parent. `bounds` are 0
    and the end of each level. A level must hold the children of one parent after another, all sorted best first.
    """
    parts, ends = [], [0]
    for level, (start, stop) in enumerate(pairwise(bounds)):
        parents, kept = (width, narrower) if level else (1, 1)
        if stop - start != parents * width:
            return None
        parts.append(scores[:, start:stop].unflatten(1, (parents, width))[:, :kept, :narrower].flatten(1))
        ends.append(ends[-1] + parts[-1].shape[1])
    return cat(parts, dim=1), ends


class ThroughputMemory:
    """Keeps means over past steps (tokens per second, gains of head and lookup); decides when to use which of both."""

    def __init__(self) -> None:
        self.head_was_right = True  # whether, in most rows, the last draft included the next token
        self._tokens, self._seconds = 0.0, 0.0  # decaying sums
        # Means over drafts, in tokens: the gain without lookup, by `head_was_right`, and the price. The price starts
        # at 0, because other processes may have slowed the first draft
        self._gains, self._price = [_FIRST_GAIN, _FIRST_GAIN], 0.0
        self._probes, self._looks = Trials(_FIRST_PROBE, _LAST_PROBE), Trials(_FIRST_LOOK, _LAST_LOOK)
        self._look_gain = _FIRST_GAIN  # mean gain of lookups, in tokens

    def add(self, record: StepRecord) -> None:
        self._tokens = self._tokens * _MEMORY + record.mean_emitted
        self._seconds = self._seconds * _MEMORY + max(record.step_seconds, 0.0)

    def rate(self, plain_seconds: float) -> float:
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        return min(max(rate, 1.0 / plain_seconds), _MAX_RATE / plain_seconds) if plain_seconds > 0 else rate

    def note_draft(self, gain: float, price: float, lookup_hit: float) -> None:
        """Update the means with a draft's estimated gain and price, in tokens; `lookup_hit` is P(lookup was right).

        Estimated gains vary less than actual ones; `AcceptanceModel` learns from the actual outcomes.
        """
        known = self._gains[self.head_was_right]
        self._gains[self.head_was_right] += _NEWEST * (gain - (1.0 - lookup_hit) * known)
        self._price += _NEWEST * (price - self._price)

    def asks_head(self, lookup_hit: float) -> bool:
        """Decide whether to draft with the head, which gains nothing if lookup is right (probability `lookup_hit`)."""
        pays = self._gains[self.head_was_right] * (1.0 - lookup_hit) > self._price
        return (pays or lookup_hit < _LIKELY) and self._probes.is_due(pays=pays)

    def looks_up(self, price: float) -> bool:
        """Return whether to call lookup: if its mean gain covers its cost, `price` tokens, or if a trial is due."""
        return self._looks.is_due(pays=self._look_gain >= price)

    def note_look(self, gain: float) -> None:
        """Update the mean net gain of lookups with the newest lookup's `gain`, in tokens."""
        self._look_gain += _NEWEST_LOOK * (gain - self._look_gain)


def doubled(width: int, most: int) -> tuple[int, ...]:
    """Return (width, 2 * width, 4 * width, ..., most), such as (4, 8, 10); only (width,) if it is not below `most`."""
    return (width, *doubled(min(2 * width, most), most)) if width < most else (width,)


class WiderDrafts:
    """Chooses the number of children per drafted node, for one row on a CPU. More children must pay for their time.

    A wider draft contains the narrower draft, so a trial estimates the net gains of both at the same position of a
    text. Gains differ much more between positions than between widths.
    """

    def __init__(self, most: int) -> None:
        self.widths, self._chosen = doubled(min(_FIRST_WIDTH, most), most), 0
        self._gains = [0.0] * len(self.widths)  # mean net gain of each width over the next narrower one, in tokens
        self._trials = Trials(_FIRST_TRIAL, _LAST_TRIAL)

    def choose(self) -> tuple[int, int]:
        """Return the width of the coming draft, and the narrower width to compare it with (0 for none)."""
        index = 0
        while index + 1 < len(self.widths) and self._gains[index + 1] > 0.0:
            index += 1
        if index + 1 < len(self.widths) and self._trials.is_due(pays=False):
            index += 1
        self._chosen = index
        return self.widths[index], self.widths[index - 1] if index else 0

    def note(self, gain: float) -> None:
        """Learn the net gain, in tokens, of the chosen width over the narrower width."""
        self._gains[self._chosen] += _NEWEST_WIDER * (gain - self._gains[self._chosen])


class WidthMemory:
    """Picks the children per node in the exact mode (`invariant`) by measuring: 1 at first, then the fastest number.

    Only measuring can decide: without compiled kernels one more leaf costs as much as all nodes of its path, with
    such kernels next to nothing. So the next wider or narrower width is tried, less often after each failure.
    """

    def __init__(self, most: int) -> None:
        self._widths = doubled(1, most)
        self._tokens, self._seconds = [0.0] * len(self._widths), [0.0] * len(self._widths)  # decaying sums
        self._best = self._chosen = 0
        self._trial_in = self._trial_every = _FIRST_TRIAL

    def choose(self, most: int) -> int:
        widest = bisect_right(self._widths, most) - 1
        self._chosen = min(self._neighbour() if self._trial_in <= 0 else self._best, widest)
        return self._widths[self._chosen]

    def add(self, tokens: float, seconds: float) -> None:
        """Learn from the expected tokens and the seconds of the step that used the chosen width."""
        index = self._chosen
        self._tokens[index] = self._tokens[index] * _MEMORY + tokens
        self._seconds[index] = self._seconds[index] * _MEMORY + seconds
        if index == self._best:
            self._trial_in -= 1
            return
        is_better = self._rate(index) > _MARGIN * self._rate(self._best)
        self._trial_every = _FIRST_TRIAL if is_better else min(2 * self._trial_every, _LAST_TRIAL)
        self._best, self._trial_in = index if is_better else self._best, self._trial_every

    def _neighbour(self) -> int:
        """Return the index of the next wider or narrower width, whichever was used for fewer seconds."""
        neighbours = [index for index in (self._best + 1, self._best - 1) if 0 <= index < len(self._widths)]
        return min(neighbours, key=self._seconds.__getitem__, default=self._best)

    def _rate(self, index: int) -> float:
        return self._tokens[index] / self._seconds[index] if self._seconds[index] > 0 else 0.0
