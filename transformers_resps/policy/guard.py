"""Bounds what drafting may lose: a small share of the time, and what drafting has won."""

import copy
from typing import Any, Self

from torch import Tensor

from ..telemetry.report import StepRecord
from ..tree import TreeShape
from .costs import INTERRUPTED, RunningCosts
from .decisions import ask_shape, count_nodes, wants_level
from .policy import Level, Observation, Policy
from .saving import SavedPolicy, check_known, class_of
from .wrapper import PolicyWrapper


_SHARE = 0.008  # of all seconds: the share that drafting may lose for good
_LOAN = 0.2  # plain steps that a call may lose from its start
_EVIDENCE_LOAN = 1.2  # further plain steps, once the estimates rest on outcomes
_TRIAL_LOAN = 0.5  # further plain steps for trying drafting at all
_EVIDENCE_PER_TOKEN, _TRIAL_PER_TOKEN = 0.015, 0.005  # limits of both near the end, per token left
_MAX_SAVED, _MAX_CARRIED = 16.0, 4.0  # plain steps won that are kept: in a call, for the next call
_REVALUED = 1.0  # plain steps: what savings are cut to when plain steps are far cheaper than known
_LUCK = 2.0  # tokens that a row of a batch may lag without counting as slower than the mean
_HIGHER, _LOWER = 0.2, 0.5  # weight of a new plain time: a slow moment must not credit trees
_REMEASURE = 64  # drafted steps after which a plain one is timed again
_OUTDATED = 0.7  # times the expected seconds: less shows that the machine or the batch has changed
_FAR = 256  # positions: a new call whose context differs by more times a plain step again, because of attention
_UNKNOWN_TREE, _UNKNOWN_LEVEL = 0.5, 0.1  # plain steps added to the guessed cost of the first tree, the first level


class BaselineGuard(PolicyWrapper, SavedPolicy):
    """Falls back to plain decoding when drafting loses time.

    Keeps a budget in seconds. A drafted step earns what its tokens would have taken plainly and pays what it took.
    0.8% of all time is added for exploration. A step that would exceed the budget if nothing were accepted is made
    smaller, down to a plain step. So a new head is first asked for one level of which nothing is verified, then for
    small trees, each of at most twice the nodes of any before.

    Bound: a call of `n` tokens loses at most `0.7 + 0.008 n` plain steps on a head of which nothing was ever
    accepted. In addition it may lose:

    - 1.2 plain steps if a head disappoints after good evidence, less near the end of the sequence;
    - what drafting has won, up to 16 plain steps from this call and 4 from earlier calls;
    - once, what the first tree of two nodes takes, on a machine where a second node is extremely expensive.

    Not in the budget: time spent on the prompt before the first decision (`Observation.prompt_seconds`), and the
    excess of a forward that takes far longer than its size ever did, which counts as an interruption. While the budget
    is negative, nothing is drafted. The debt is reduced if the next plain step is slower too: then the machine was.

    Batches: the tokens of the slowest row count. A lag of up to two tokens counts as chance, and its cost may be lost
    for good. Once half of the rows have ended, a debt is forgiven, as at the beginning of a call.

    Args:
        policy: any policy. What it learned, and the guard's own measurements, are kept between calls of `generate`.

    Raises:
        ValueError: `policy` is no policy.
    """

    policy_type = "guard"

    def __init__(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise ValueError(
                f"`BaselineGuard` needs an object of a subclass of `Policy`, got {policy!r}. Pass a policy, for "
                "example `BaselineGuard(ThroughputPolicy())`, which is what 'auto' means."
            )
        super().__init__(policy)
        self._learns_costs = self.costs is None
        self._known = self.costs or RunningCosts()
        self._plain_seconds = self._known.step_seconds(1, 0) if self._known.knows_plain else 0.0
        self._account = 0.0  # seconds
        self._since_plain = 0
        self._gained_since = 0.0  # tokens that trees gained since a plain step was timed
        self._context = self._timed_at = 0  # positions: of this step, and where a plain step was timed last
        self._moved = False  # from there to another context, since this text began
        # Seconds that this step may lose: all in all, with a tree of the head's, with a looked-up chain
        self._budget = self._tree_budget = self._lookup_budget = 0.0
        self._levels = 0
        self._nodes = 1  # most of this step's
        self._written: list[int] = []  # tokens of each row since this text began
        self._rows = 0  # that were decoded when debts were forgiven last
        # Costs and a plain step's seconds before the first row of this batch ended; the next batch starts with them
        self._of_all_rows: tuple[RunningCosts, float] | None = None

    def __repr__(self) -> str:
        return f"BaselineGuard({self.policy!r})"

    def choose(self, observation: Observation) -> TreeShape:
        self._context = observation.context_length
        if observation.step == 0:
            self._begin()
        self._levels = 0
        if not self._known.knows_plain or self._since_plain >= _REMEASURE or self._moved:
            return TreeShape.plain()
        shape = ask_shape(self.policy, observation)
        if shape.is_plain:
            return shape
        room = observation.room
        trial = min(_TRIAL_LOAN, _TRIAL_PER_TOKEN * room) * self._plain_seconds
        evidence = min(_EVIDENCE_LOAN, _EVIDENCE_PER_TOKEN * room) * self._plain_seconds
        self._lookup_budget = self._account + evidence  # a lookup's record also grows in plain steps
        confident = evidence if self.is_confident else 0.0
        self._tree_budget = self._account + confident
        self._budget = self._tree_budget + trial
        if not self.probes_head:
            self._tree_budget = self._budget
        return self._affordable(shape)

    def grow(self, level: Level) -> bool:
        if self._nodes == 1 or self._drafting(level.depth + 1) > self._budget:  # a glance is one level
            return False
        self._levels = level.depth + 1
        return wants_level(self.policy, level)

    def size(self, scores: Tensor, levels: Tensor) -> int:
        return min(count_nodes(self.policy, scores, levels), self._nodes)

    def observe(self, record: StepRecord) -> None:
        nodes, seconds, gained = record.verified, max(record.step_seconds, 0.0), self._gained(record)
        if self._of_all_rows is None and record.decoded_rows < len(self._written):
            self._of_all_rows = copy.deepcopy(self._known), self._plain_seconds
        if 2 * record.decoded_rows <= self._rows:  # what was too expensive for all rows may pay for half of them
            self._account = max(self._account, _LOAN * self._plain_seconds)
        if 2 * record.decoded_rows <= self._rows or not self._rows:
            self._rows = record.decoded_rows
        if nodes == 1:
            self._time_plain(seconds - max(record.draft_seconds, 0.0))
        outdated = nodes > 1 and record.verify_seconds < _OUTDATED * self._known.verify_seconds(nodes)
        if record.shape.is_plain:
            self._since_plain = 0
        elif self._plain_seconds > 0:
            self._settle(record, seconds, gained)
        if outdated:
            self._since_plain = _REMEASURE
        self._account = min(self._account + _SHARE * seconds, _MAX_SAVED * self._plain_seconds)
        if self._learns_costs:
            levels = max(self._levels, 1) if record.shape.asks_head else 0
            times = (record.verify_seconds, record.draft_seconds, record.step_seconds)
            self._known.add(nodes, levels, *times, rows=record.decoded_rows)
        self.policy.observe(record)

    def _begin(self) -> None:
        """A new call: debts are forgiven, savings are cut, and costs at a far shorter or longer context don't hold."""
        self._written, self._rows, self._gained_since = [], 0, 0.0
        if self._of_all_rows is not None:
            costs, self._plain_seconds = self._of_all_rows
            self._known.go_back_to(costs)
            self._of_all_rows = None
        self._moved = self._timed_at > 0 and abs(self._context - self._timed_at) > _FAR
        least, most = _LOAN * self._plain_seconds, _MAX_CARRIED * self._plain_seconds
        self._account = min(max(self._account, least), most)

    def _gained(self, record: StepRecord) -> float:
        """Tokens by which the unfinished rows advanced."""
        emitted = record.emitted
        if len(self._written) != len(emitted):
            self._written = [0] * len(emitted)
        writing = [row for row, count in enumerate(emitted) if count]
        before = self._progress(writing)
        for row in writing:
            self._written[row] += emitted[row]
        return self._progress(writing) - before

    def _progress(self, rows: list[int]) -> float:
        """Tokens of the slowest row plus `_LUCK`, but at most the mean over rows."""
        written = [self._written[row] for row in rows]
        return min(min(written) + _LUCK, sum(written) / len(written)) if written else 0.0

    def _settle(self, record: StepRecord, seconds: float, gained: float) -> None:
        """Update the budget after a step that drafted."""
        if record.verified == 1:  # a glance pays for its draft alone, not for the machine's speed at that moment
            self._since_plain = 0
            self._account -= max(record.draft_seconds, 0.0)
        else:
            self._since_plain += 1
            interrupted = record.verify_seconds - self._known.uninterrupted(record.verified, record.verify_seconds)
            self._account += gained * self._plain_seconds - (seconds - interrupted)
            self._gained_since += gained

    def _time_plain(self, seconds: float) -> None:
        self._timed_at = self._context
        gained, self._gained_since = self._gained_since, 0.0
        if self._moved and min(seconds, self._plain_seconds) > 0.0:
            self._known.rescale(seconds / self._plain_seconds)
            self._account *= seconds / self._plain_seconds
            self._plain_seconds, self._moved = seconds, False
        elif self._plain_seconds <= 0:
            self._plain_seconds = max(seconds, 0.0)
            self._account += _LOAN * self._plain_seconds
        elif 0.0 < seconds < _OUTDATED * self._plain_seconds:
            self._plain_seconds = seconds
            self._account = min(self._account, _REVALUED * seconds)  # it was earned at the old price
        else:
            seconds = min(seconds, INTERRUPTED * self._plain_seconds)
            self._revalue(gained * (seconds - self._plain_seconds))
            weight = _LOWER if seconds < self._plain_seconds else _HIGHER
            self._plain_seconds += weight * (seconds - self._plain_seconds)

    def _revalue(self, lost: float) -> None:
        """Reduce a debt by the seconds that trees lost because the machine had become slower, plain steps included."""
        if self._account < 0.0:
            self._account = min(self._account + max(lost, 0.0), 0.0)

    def _affordable(self, shape: TreeShape) -> TreeShape:
        """The largest part of `shape` that the budget can pay for if nothing is accepted."""
        most = 2 * self._known.largest_tree  # costs are extrapolated to twice the largest tree, not further
        lookup = min(shape.lookup, most - 1)
        while lookup and self._verifying(1 + lookup) > self._lookup_budget:
            lookup -= 1
        drafted = TreeShape(1, 0, 1, lookup)
        if not shape.asks_head:
            return drafted
        probes_head = self.probes_head
        depth = shape.depth if not probes_head else 1  # a policy that does not glance pays for all levels at once
        while depth and self._drafting(depth) > self._budget:
            depth -= 1
        nodes = min(shape.total_tokens, most - lookup) if depth else 1
        drafting = self._drafting(depth)
        while nodes > 1 and self._verifying(nodes + lookup) + drafting > self._tree_budget:
            nodes -= 1
        if depth == 0 or (nodes == 1 and not probes_head):
            return drafted
        self._levels, self._nodes = 1, nodes
        return TreeShape(
            shape.total_tokens if probes_head else nodes, shape.depth if probes_head else depth, shape.top_k, lookup
        )

    def _verifying(self, nodes: int) -> float:
        """Seconds that verifying `nodes` takes beyond a plain step; a cautious guess before any tree was measured."""
        if nodes <= 1:
            return 0.0
        unknown = 0.0 if self._known.knows_trees else _UNKNOWN_TREE * self._plain_seconds
        return self._known.verify_seconds(nodes) - self._known.verify_seconds(1) + unknown

    def _drafting(self, levels: int) -> float:
        if self._known.knows_head:
            return self._known.draft_seconds(levels)
        return levels * _UNKNOWN_LEVEL * self._plain_seconds

    def to_config(self) -> dict[str, Any]:
        """Return the config of the guarded policy, with its type, as JSON values.

        Raises:
            ValueError: the guarded policy cannot be saved.
        """
        if not isinstance(self.policy, SavedPolicy):
            raise ValueError(
                f"The guarded {type(self.policy).__name__} has no `save_pretrained`, so it cannot be saved. Subclass "
                "`SavedPolicy` instead of `Policy`."
            )
        return {"policy": {"policy_type": self.policy.policy_type, **self.policy.to_config()}}

    def state_tensors(self) -> dict[str, Tensor]:
        return self.policy.state_tensors() if isinstance(self.policy, SavedPolicy) else {}

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        check_known(cls.policy_type, config, ("policy",))
        if not isinstance(config["policy"], dict) or not isinstance(config["policy"].get("policy_type"), str):
            raise ValueError(
                "The config of a guard must hold the guarded policy with its `policy_type`, got "
                f"{config['policy']!r}. Download or save it again."
            )
        values = dict(config["policy"])
        if values["policy_type"] == cls.policy_type:
            raise ValueError(
                "The config of a guard holds another guard, but only one is supported. Save the policy again."
            )
        return cls(class_of(values.pop("policy_type")).from_saved(values, tensors))
