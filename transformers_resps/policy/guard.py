"""Fall back to plain decoding where drafting loses time, around any policy."""

from typing import Any, Self

from torch import Tensor

from ..telemetry.report import StepRecord
from ..tree import TreeShape
from .costs import RunningCosts
from .decisions import ask_shape, count_nodes, wants_level
from .exploration_budget import ExplorationBudget, StepLimits
from .guard_config import GuardConfig
from .plain_clock import PlainChange, PlainClock
from .policy import Level, Observation, Policy
from .row_progress import RowProgress
from .saving import SavedPolicy, check_known, class_of
from .wrapper import PolicyWrapper


class BaselineGuard(PolicyWrapper, SavedPolicy):
    """Falls back to plain decoding when drafting loses time.

    Keeps an exploration budget in seconds. A drafted step earns what its tokens would have taken plainly and pays what
    it took. 0.8% of all time is added for exploration. A step that would exceed the budget if nothing were accepted is
    made smaller, down to a plain step. So a new head is first asked for draft-only probes, one level of which nothing
    is verified, then for small trees, each of at most twice the nodes of any before.

    Bound: a call of `n` tokens loses at most `0.7 + 0.008 n` plain steps on a head of which nothing was ever
    accepted. In addition it may lose:

    - 1.2 plain steps if a head disappoints after good evidence, less near the end of the sequence;
    - what drafting has won, up to 16 plain steps from this call and 4 from earlier calls;
    - once, what the first tree of two nodes takes, on a machine where a second node is extremely expensive.

    Not in the budget: time spent on the prompt before the first decision (`Observation.prompt_seconds`), and the
    excess of a forward that takes far longer than its size ever did, which counts as an interruption. While the budget
    is negative, nothing is drafted. It recovers if the next plain step is slower too: then the machine was.

    Batches: the tokens of the slowest row count. A lag of up to two tokens counts as chance, and its cost may be lost
    for good. Once half of the rows have ended, losses are forgiven, as at the beginning of a call.

    Source: conservative exploration (Wu et al. 2016, arXiv 1602.04282), see `ExplorationBudget`.

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
        self._config = GuardConfig()
        self._learns_costs = policy.costs is None
        self._known = policy.costs or RunningCosts()
        self._plain = PlainClock(self._config, self._known.step_seconds(1, 0) if self._known.knows_plain else 0.0)
        self._budget = ExplorationBudget(self._config)
        self._progress = RowProgress(self._config.lag_tokens)
        self._limits = StepLimits(0.0, 0.0, 0.0)  # of this step
        self._levels, self._nodes = 0, 1  # drafted in this step; at most verified in it
        self._rows = 0  # that were decoded when losses were forgiven last
        # Costs and a plain step's seconds before the first row of this batch ended; the next batch starts with them
        self._of_all_rows: tuple[RunningCosts, float] | None = None

    def __repr__(self) -> str:
        return f"BaselineGuard({self.policy!r})"

    def choose(self, observation: Observation) -> TreeShape:
        if observation.step == 0:
            self._begin_call(observation.context_length)
        self._plain.begin_step(observation.context_length)
        self._levels = 0
        if not self._known.knows_plain or self._plain.is_due:
            return TreeShape.plain()
        shape = ask_shape(self.policy, observation)
        if shape.is_plain:
            return shape
        self._limits = self._budget.limits(
            observation.room, self._plain.seconds, is_confident=self.is_confident, probes_head=self.probes_head
        )
        return self._affordable(shape)

    def grow(self, level: Level) -> bool:
        is_probe = self._nodes == 1  # draft-only, of one level
        if is_probe or self._drafting(level.depth + 1) > self._limits.total:
            return False
        self._levels = level.depth + 1
        return wants_level(self.policy, level)

    def size(self, scores: Tensor, levels: Tensor) -> int:
        return min(count_nodes(self.policy, scores, levels), self._nodes)

    def observe(self, record: StepRecord) -> None:
        seconds, gained = max(record.step_seconds, 0.0), self._progress.add(record)
        self._follow_rows(record)
        if record.verified == 1:
            self._time_plain(seconds - max(record.draft_seconds, 0.0))
        expected = self._config.outdated * self._known.verify_seconds(record.verified)
        is_outdated = record.verified > 1 and record.verify_seconds < expected
        if record.shape.is_plain:
            self._plain.count_plain()
        elif self._plain.seconds > 0:
            self._settle(record, seconds, gained)
        if is_outdated:
            self._plain.expire()
        self._budget.end_step(seconds, self._plain.seconds)
        if self._learns_costs:
            levels = max(self._levels, 1) if record.shape.asks_head else 0
            times = (record.verify_seconds, record.draft_seconds, record.step_seconds)
            self._known.add(record.verified, levels, *times, rows=record.decoded_rows)
        self.policy.observe(record)

    def _begin_call(self, context: int) -> None:
        """Costs are again those of all rows, and losses are forgiven."""
        self._progress.begin_call()
        self._rows = 0
        if self._of_all_rows is not None:
            costs, self._plain.seconds = self._of_all_rows
            self._known.go_back_to(costs)
            self._of_all_rows = None
        self._plain.begin_call(context)
        self._budget.begin_call(self._plain.seconds)

    def _follow_rows(self, record: StepRecord) -> None:
        """Keep what steps cost before rows end; what was too expensive for all rows may pay for half of them."""
        if self._of_all_rows is None and record.decoded_rows < self._progress.row_count:
            self._of_all_rows = self._known.copy(), self._plain.seconds
        is_half = 2 * record.decoded_rows <= self._rows
        if is_half:
            self._budget.forgive(self._plain.seconds)
        if is_half or not self._rows:
            self._rows = record.decoded_rows

    def _settle(self, record: StepRecord, seconds: float, gained: float) -> None:
        """Update the budget after a step that drafted."""
        if record.verified == 1:  # a probe pays for its draft alone, not for the machine's speed at that moment
            self._plain.count_plain()
            self._budget.settle(-max(record.draft_seconds, 0.0))
        else:
            interrupted = record.verify_seconds - self._known.uninterrupted(record.verified, record.verify_seconds)
            self._budget.settle(gained * self._plain.seconds - (seconds - interrupted))
            self._plain.count_tree(gained)

    def _time_plain(self, seconds: float) -> None:
        timing = self._plain.time(seconds)
        match timing.change:
            case PlainChange.FIRST:
                self._budget.open(self._plain.seconds)
            case PlainChange.MOVED:
                self._known.rescale(timing.factor)
                self._budget.rescale(timing.factor)
            case PlainChange.CHEAPER:
                self._budget.reprice(self._plain.seconds)
            case PlainChange.USUAL:
                self._budget.excuse(timing.excess)

    def _affordable(self, shape: TreeShape) -> TreeShape:
        """The largest part of `shape` that the budget can pay for if nothing is accepted."""
        most = 2 * self._known.largest_tree  # costs are extrapolated to twice the largest tree, not further
        lookup = min(shape.lookup, most - 1)
        while lookup and self._verifying(1 + lookup) > self._limits.lookup:
            lookup -= 1
        looked_up = TreeShape(1, 0, 1, lookup)
        if not shape.asks_head:
            return looked_up
        probes_head = self.probes_head
        by_level = probes_head and self.grows
        depth = 1 if by_level else shape.depth  # a policy that does not stop in between pays for all levels at once
        while depth and self._drafting(depth) > self._limits.total:
            depth -= 1
        nodes = min(shape.total_tokens, most - lookup) if depth else 1
        drafting = self._drafting(depth)
        while nodes > 1 and self._verifying(nodes + lookup) + drafting > self._limits.tree:
            nodes -= 1
        if depth == 0 or (nodes == 1 and not probes_head):
            return looked_up
        deepest = shape.depth if by_level else depth if nodes > 1 else 1
        self._levels, self._nodes = 1 if self.grows else deepest, nodes  # `grow` counts further levels, where asked
        if probes_head:
            return TreeShape(shape.total_tokens, deepest, shape.top_k, lookup)
        return TreeShape(nodes, depth, shape.top_k, lookup)

    def _verifying(self, nodes: int) -> float:
        """Seconds that verifying `nodes` takes beyond a plain step; a cautious guess before any tree was measured."""
        if nodes <= 1:
            return 0.0
        unknown = 0.0 if self._known.knows_trees else self._config.unknown_tree_steps * self._plain.seconds
        return self._known.verify_seconds(nodes) - self._known.verify_seconds(1) + unknown

    def _drafting(self, levels: int) -> float:
        if self._known.knows_head:
            return self._known.draft_seconds(levels)
        return levels * self._config.unknown_level_steps * self._plain.seconds

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
