"""`BaselineGuard` wraps any policy and returns to plain decoding where drafting loses time.

Source: Wu et al., "Conservative Bandits" (arXiv 1602.04282): an action is taken only if the budget covers its worst
outcome. Here the worst outcome is that no drafted token is accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from ..telemetry.report import StepRecord
from ..tree import TreeShape
from .base import Level, Observation, Policy, PolicyWrapper, Trials, ask_shape, count_nodes, wants_level
from .costs import INTERRUPTED, RunningCosts
from .saving import SavedPolicy, check_known, class_of


# Limits of the time that drafting may lose. Constants with `_STEPS` are multiples of a plain step's duration.
SHARE = 0.008  # Share of all time that may be lost for good: well below the allowed 3%, because timing has errors.
START_STEPS = 0.2  # Budget at the start of every call, so that a head is tried again after a bad call.
TRIAL_STEPS = 0.5  # Extra loss allowed to a step for a trial of drafting; with `START_STEPS` it pays for a first tree.
TRIAL_STEPS_PER_TOKEN = 0.005  # Limits `TRIAL_STEPS` near a text's end, where few tokens can earn it back.
CONFIDENT_STEPS = 1.2  # Extra loss allowed to a confident policy, so that bad luck does not rule out its best tree.
CONFIDENT_STEPS_PER_TOKEN = 0.015  # Limits `CONFIDENT_STEPS` near a text's end.
MAX_EARNED_STEPS = 16.0  # Maximum of the budget, which drafting fills with the time that it saves.
MAX_CARRIED_STEPS = 4.0  # Maximum of the budget when the next call starts, perhaps with another kind of text.
MAX_REPRICED_STEPS = 1.0  # Maximum of the budget once plain steps are much faster: gains were overestimated.
LAG_TOKENS = 2.0  # A row of a batch that lags the mean by fewer tokens counts as unlucky, not as slower.

# Timing of plain steps.
PLAIN_UP, PLAIN_DOWN = 0.2, 0.5  # Weights of a higher and lower new time: slow moments must not favour trees for long.
MAX_TREES_BETWEEN = 64  # Drafted steps after which a plain step is timed again.
OUTDATED = 0.7  # A time below this share of the expected time shows that the machine or the batch has changed.
FAR_POSITIONS = 256  # If the context differs by more positions, plain steps are timed again.

# Decision whether the head processes the prompt of a call.
HEAD_MEMORY = 0.995  # Past savings of the head are multiplied by this for each new token of a text.
ENOUGH_TOKENS = 128.0  # Tokens that are decoded with a head before a call may skip it.
MAX_LEFT_OUT = 32  # Most calls between two trials of a head.
PROMPT_WEIGHT = 0.3  # Weight of the newest prompt in the mean time per prompt token.

EXPLAINED_STEPS = 8  # Calls with fewer steps get no explanation why most steps were plain.

# Guesses in plain steps before the first tree and draft: extra cost of a tree (mask, new code), and cost of a level.
UNKNOWN_TREE_STEPS, UNKNOWN_LEVEL_STEPS = 0.5, 0.1

_PLAIN = TreeShape.plain()


class BaselineGuard(PolicyWrapper, SavedPolicy):
    """Wraps a policy and returns to plain decoding when drafting loses time.

    The guard keeps a budget in seconds. A drafted step adds the time that plain decoding needs for its tokens and
    subtracts its duration; 0.8% of all time is added for exploration. In the worst case nothing is accepted; if the
    budget cannot pay for that, the step is made smaller, down to a plain step. So a new head drafts one level first,
    and only nodes that cost nothing are verified; then come small trees, each at most twice as large as any before.

    Bound: a call of `n` tokens loses at most `0.7 + 0.008 n` plain steps on a head whose drafts are never accepted.
    It may also lose:

    - 1.2 plain steps if a head disappoints after good evidence, less near the end of the sequence;
    - the gains of drafting, up to 16 plain steps from this call and 4 from earlier calls;
    - once, the first tree of two nodes, on a machine where a second node is extremely expensive.

    The budget does not pay for interruptions by other processes (if a forward takes far longer than ever for its size,
    the excess is ignored), nor for the head's pass over the prompt, see `HeadAccount`. While the budget is negative,
    nothing is drafted; if the next plain step is slow, too, the machine was slow and the loss is forgotten.

    In a batch the tokens of the slowest row count. A row may lag by two tokens at no charge to the budget, so a batch
    may lose that time, too. When half of the rows have ended, losses are forgiven, as at the start of a call.

    Policy and guard keep their estimates between calls of `generate`.
    """

    policy_type = "guard"

    def __init__(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise ValueError(
                f"`BaselineGuard` needs an object of a subclass of `Policy`, got {policy!r}. Pass a policy, for "
                "example `BaselineGuard(ThroughputPolicy())`, which is what 'auto' means."
            )
        super().__init__(policy)
        self._own_costs = RunningCosts()  # used if the policy learns no costs
        known = self._known
        self._plain = PlainClock(known.step_seconds(_PLAIN, 0) if known.knows_plain else 0.0)
        self._budget = ExplorationBudget()
        self._progress, self._head = RowProgress(), HeadAccount()
        # State of the coming step: limits, drafted levels, most nodes, `Observation.node_price`, nodes per level
        self._limits = StepLimits(0.0, 0.0, 0.0)
        self._levels, self._nodes, self._node_price, self._width = 0, 1, 1, 1
        self._rows = 0  # number of decoded rows when losses were last forgiven
        # Costs and seconds of a plain step before the first row of this batch ended, for the start of the next batch
        self._of_all_rows: tuple[RunningCosts, float] | None = None

    def __repr__(self) -> str:
        return f"BaselineGuard({self.policy!r})"

    @property
    def _known(self) -> RunningCosts:
        return self._own_costs if self.policy.costs is None else self.policy.costs

    def _adopt(self, costs: RunningCosts) -> None:
        if self.policy.costs is None:
            self._own_costs = costs
        else:
            self.policy.adopt_costs(costs)

    def wants_head(self, rows: int, tokens: int, room: int) -> bool:
        pays = self._head.pays(rows, tokens, room) or self.needs_head
        return pays and self.policy.wants_head(rows, tokens, room)

    def choose(self, observation: Observation) -> TreeShape:
        if observation.step == 0:
            self._begin_call(observation.context_length)
            self._head.begin_call(observation.prompt_seconds if observation.can_draft else None)
        self._plain.context = observation.context_length
        self._levels = 0
        if not self._known.knows_plain or self._plain.is_due:
            return TreeShape.plain()
        shape, self._node_price = ask_shape(self.policy, observation), observation.node_price
        if shape.is_plain:
            return shape
        self._limits = self._budget.limits(
            observation.room, self._plain.seconds, is_confident=self.is_confident, probes_head=self.probes_head
        )
        return self._affordable(shape, observation)

    def grow(self, level: Level) -> bool:
        is_probe = self._nodes == 1  # one level is drafted and not verified
        if is_probe or self._drafting(self._width, level.depth + 1) > self._limits.total:
            return False
        self._levels = level.depth + 1
        return wants_level(self.policy, level)

    def size(self, scores: Tensor, levels: Tensor) -> int | Sequence[int]:
        counts, most = count_nodes(self.policy, scores, levels), max(self._nodes, 1)
        while self._priced(counts, most) > self._nodes and most > 1:
            most -= 1
        counts = [min(count, most) for count in counts]
        return counts if len(set(counts)) > 1 else counts[0]

    def _priced(self, counts: Sequence[int], most: int) -> int:
        """Return the node count on which a step's cost depends if rows verify `counts` nodes, but at most `most`."""
        return 1 + sum(max(min(count, most) - 1, 0) for count in counts) * self._node_price // len(counts)

    def observe(self, record: StepRecord) -> None:
        seconds, gained = max(record.step_seconds, 0.0), self._progress.add(record)
        self._follow_rows(record)
        if record.verified == 1:
            factor = self._plain.time(seconds - max(record.draft_seconds, 0.0), self._budget)
            if factor != 1.0:
                self._adopt(self._known.rescaled(factor))
        expected = OUTDATED * self._known.verify_seconds(record.computed)
        is_outdated = record.verified > 1 and record.verify_seconds < expected
        if record.shape.is_plain:
            self._plain.count_plain()
        elif self._plain.seconds > 0:
            self._settle(record, seconds, gained)
        if is_outdated:
            self._plain.expire()
        self._budget.end_step(seconds, self._plain.seconds)
        self._head.tokens += gained
        if self.policy.costs is None:
            levels = max(self._levels, 1) if record.shape.asks_head else 0
            times = (record.verify_seconds, record.draft_seconds, record.step_seconds)
            width, rows = record.shape.top_k, record.rows_of_a_node
            self._own_costs.add(record.computed, levels, *times, width=width, rows=rows)
        self.policy.observe(record)

    def explain(self, steps: Sequence[StepRecord]) -> str | None:
        decided = steps[1:]
        trees = [step for step in decided if step.verified > 1]
        if len(decided) < EXPLAINED_STEPS or 2 * len(trees) >= len(decided):
            return None
        reasons = []
        if self._known.knows_trees and self._plain.seconds > 0:
            cost = 1.0 + self._verifying(2) / self._plain.seconds
            reasons.append(f"2 nodes cost {cost:.1f} plain steps here")
        if trees:
            idle = sum(not step.drafted for step in decided)
            reasons += [f"{idle} of {len(decided)} steps had nothing worth verifying"] if idle else []
            gained = sum(step.mean_emitted - 1.0 for step in trees) / len(trees)
            counted = f"{len(trees)} trees gained {gained:.1f} tokens each"
            reasons.append(counted if len(trees) > 1 else f"the only tree gained {gained:.0f} tokens")
        if tests := [step for step in decided if step.drafted and step.verified == 1]:
            right, is_untried = sum(max(step.drafted_match) > 0 for step in tests), not self._known.knows_trees
            told = f"{right} of {len(tests)} drafts that were not verified had the target's next token"
            told += ", so no tree was tried" if is_untried else ""
            reasons.append("warming up, no tree tried yet" if is_untried and len(tests) < EXPLAINED_STEPS else told)
        if self._head.is_left_out:
            reasons.append("earlier calls of as many rows gained too little by the head for it to read the prompt")
        elif not any(step.drafted for step in decided):
            reasons.append("nothing worth verifying was drafted")
        return f"Mostly plain: {', '.join(reasons)}."

    def _begin_call(self, context: int) -> None:
        """Restore the costs that `_follow_rows` saved in the last batch; raise a low budget to its starting value."""
        self._progress.begin_call()
        self._rows = 0
        if self._of_all_rows is not None:
            costs, self._plain.seconds = self._of_all_rows
            self._adopt(costs)
            self._of_all_rows = None
        self._plain.begin_call(context)
        self._budget.begin_call(self._plain.seconds)

    def _follow_rows(self, record: StepRecord) -> None:
        """Save the costs when the first row ends; `forgive` losses whenever half of the rows have ended."""
        if self._of_all_rows is None and record.decoded_rows < len(self._progress.written):
            self._of_all_rows = self._known.copy(), self._plain.seconds
        is_half = 2 * record.decoded_rows <= self._rows
        if is_half:
            self._budget.forgive(self._plain.seconds)
        if is_half or not self._rows:
            self._rows = record.decoded_rows

    def _settle(self, record: StepRecord, seconds: float, gained: float) -> None:
        if record.verified == 1:  # an unverified draft costs its own time, not the step's
            self._plain.count_plain()
            earned = -max(record.draft_seconds, 0.0)
        else:
            interrupted = record.verify_seconds - self._known.uninterrupted(record.computed, record.verify_seconds)
            earned = gained * self._plain.seconds - (seconds - interrupted)
            self._plain.count_tree(gained)
        self._budget.seconds += earned
        if record.shape.asks_head:
            self._head.earned += earned

    def _affordable(self, shape: TreeShape, observation: Observation) -> TreeShape:
        """Reduce `shape` to the largest that the budget can pay for if nothing is accepted."""
        price, least_prob = observation.node_price, self.least_lookup_prob
        # Costs are extrapolated to twice the largest tree, not further
        most = max(2 * self._known.largest_tree, 1 + price)
        lookup, added = shape.lookup, observation.looked_up(shape.lookup, least_prob)
        while lookup and (added >= most or self._verifying(1 + added) > self._limits.lookup):
            lookup -= 1
            added = observation.looked_up(lookup, least_prob)
        looked_up = TreeShape(1, 0, 1, lookup)
        if not shape.asks_head:
            return looked_up
        self._width, probes_head = shape.top_k, self.probes_head
        by_level, at_once = probes_head and self.grows, observation.drafts_at_once
        # A policy that does not stop between levels pays for all levels; a block head drafts all levels at one price
        depth = 1 if by_level else shape.depth
        while depth and self._drafting(shape.top_k, 1 if at_once else depth) > self._limits.total:
            depth = 0 if at_once else depth - 1
        nodes = min(1 + (shape.total_tokens - 1) * price, most - added) if depth else 1
        drafting = self._drafting(shape.top_k, min(depth, 1) if at_once else depth)
        free = self._verifying(1 + added)  # nodes that cost nothing are always verified: they may earn their draft
        while nodes > 1 and drafting + (verifying := self._verifying(nodes + added)) > self._limits.tree:
            if verifying <= free:
                break
            nodes -= 1
        if observation.row_accept_probs is None:
            nodes -= (nodes - 1) % price
        if depth == 0 or (nodes == 1 and not probes_head):
            return looked_up
        deepest = shape.depth if by_level else depth if nodes > 1 or at_once else 1
        self._nodes = nodes
        self._levels = 1 if self.grows or at_once else deepest  # `grow`, if called, counts further levels
        if probes_head:
            return TreeShape(shape.total_tokens, deepest, shape.top_k, lookup)
        return TreeShape(1 + -(-(nodes - 1) // price), depth, shape.top_k, lookup)

    def _verifying(self, nodes: int) -> float:
        """Estimate by how many seconds verifying `nodes` nodes exceeds a plain step; before any tree, guess high."""
        if nodes <= 1:
            return 0.0
        unknown = 0.0 if self._known.knows_trees else UNKNOWN_TREE_STEPS * self._plain.seconds
        return self._known.verify_seconds(nodes) - self._known.verify_seconds(1) + unknown

    def _drafting(self, width: int, levels: int) -> float:
        if self._known.knows_head:
            return self._known.draft_seconds(width, levels)
        return levels * UNKNOWN_LEVEL_STEPS * self._plain.seconds

    def to_config(self) -> dict[str, Any]:
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


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most seconds that the next step may lose if nothing is accepted, depending on what the step does."""

    total: float  # for a draft of the head
    tree: float  # for a draft and its verification; below `total` if the policy learns from unverified drafts, too
    lookup: float  # for verifying looked-up nodes


class ExplorationBudget:
    """Keeps the seconds that exploration may lose against plain decoding, and limits each step to them.

    If no step loses more than its `limits`, a call loses at most the sum of its starting budget (`START_STEPS`, or up
    to `MAX_CARRIED_STEPS` of earlier gains), `SHARE` of its seconds, and `TRIAL_STEPS`. With a confident policy it may
    lose `CONFIDENT_STEPS` more.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # the budget; negative if more was lost

    def begin_call(self, plain_seconds: float) -> None:
        """Raise a low budget to its starting value, and keep at most `MAX_CARRIED_STEPS` of earlier gains."""
        self.forgive(plain_seconds)
        self.seconds = min(self.seconds, MAX_CARRIED_STEPS * plain_seconds)

    def limits(self, room: int, plain_seconds: float, *, is_confident: bool, probes_head: bool) -> StepLimits:
        """Return the seconds that the next step may lose: the budget, plus allowances that shrink with `room`."""
        trial = min(TRIAL_STEPS, TRIAL_STEPS_PER_TOKEN * room) * plain_seconds
        confident = min(CONFIDENT_STEPS, CONFIDENT_STEPS_PER_TOKEN * room) * plain_seconds
        lookup = self.seconds + confident  # lookup gathers evidence in plain steps, too
        tree = self.seconds + (confident if is_confident else 0.0)
        total = tree + trial
        return StepLimits(total, tree if probes_head else total, lookup)

    def end_step(self, step_seconds: float, plain_seconds: float) -> None:
        self.seconds = min(self.seconds + SHARE * step_seconds, MAX_EARNED_STEPS * plain_seconds)

    def forgive(self, plain_seconds: float) -> None:
        """Raise the budget to at least its starting value, because the cause of past losses is gone."""
        self.seconds = max(self.seconds, START_STEPS * plain_seconds)

    def excuse(self, lost_seconds: float) -> None:
        """Raise a negative budget by `lost_seconds`, at most to 0: a slow machine lost this time, drafting did not."""
        if self.seconds < 0.0:
            self.seconds = min(self.seconds + max(lost_seconds, 0.0), 0.0)

    def reprice(self, plain_seconds: float) -> None:
        """Cut the budget to `MAX_REPRICED_STEPS`: plain steps are faster than assumed, so gains were overestimated."""
        self.seconds = min(self.seconds, MAX_REPRICED_STEPS * plain_seconds)


class HeadAccount:
    """Decides, from earlier calls with equally many rows, whether a head saves more time than it takes for the prompt.

    A head that saves less is skipped for one call, then for exponentially more calls after each failed retry. The
    estimate assumes that texts reach their maximum length. Few do, but skipping a useful head costs far more.
    """

    def __init__(self) -> None:
        self.earned = 0.0  # seconds that this call's steps with the head saved over plain decoding
        self.tokens = 0.0  # tokens that each text of this call has gained
        self.is_left_out = self._is_refused = False  # whether this call, and the coming call, skips the head
        self._calls: dict[int, _HeadCalls] = {}  # number of rows -> earlier calls
        self._open: _HeadCalls | None = None  # entry of `_calls` for this call, if it has a head
        self._next, self._next_tokens = _HeadCalls(), 1  # entry and number of prompt tokens of the coming call
        self._token_seconds = 0.0  # estimated seconds that the head needs for a prompt token

    def pays(self, rows: int, tokens: int, room: int) -> bool:
        """Decide whether the head should read the prompts of the coming call; arguments as in `Policy.wants_head`."""
        self._close()
        self._next, self._next_tokens = self._calls.setdefault(rows, _HeadCalls()), tokens
        self._is_refused = not self._next.is_tried(room, self._token_seconds * tokens)
        return not self._is_refused

    def begin_call(self, prompt_seconds: float | None) -> None:
        """Begin a call; record the seconds that the head took for its prompts (`None` if the call has no head)."""
        self._close()
        self.is_left_out, self._is_refused = self._is_refused and prompt_seconds is None, False
        if prompt_seconds is None:
            return
        self._open, known = self._next, self._token_seconds
        each = max(prompt_seconds, 0.0) / self._next_tokens
        each = min(each, INTERRUPTED * known) if known > 0.0 else each
        self._token_seconds += (PROMPT_WEIGHT if known > 0.0 else 1.0) * (each - known)

    def _close(self) -> None:
        if self._open is not None:
            self._open.add(self.earned, self.tokens)
        self._open, self.earned, self.tokens = None, 0.0, 0.0


@dataclass(slots=True)
class _HeadCalls:
    """Decaying sums over earlier calls with one number of rows: seconds that the head saved, and tokens gained."""

    earned: float = 0.0  # seconds
    tokens: float = 0.0
    trials: Trials = field(default_factory=lambda: Trials(2, MAX_LEFT_OUT))

    def add(self, earned: float, tokens: float) -> None:
        past = HEAD_MEMORY**tokens
        self.earned, self.tokens = past * self.earned + earned, past * self.tokens + tokens

    def is_tried(self, room: int, price: float) -> bool:
        """Decide whether the head should take `price` seconds for the prompts of a call of up to `room` new tokens."""
        is_unknown = self.tokens < ENOUGH_TOKENS
        return self.trials.is_due(pays=is_unknown or self.earned / self.tokens * room > price)


class PlainClock:
    """Learns the `seconds` of a plain step (0 before the first), and decides when to time a plain step again."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.context = self._timed_at = 0  # context length of this step and of the last timing
        self._moved = False  # whether this call began with a context length far from that of the last timing
        self._trees = 0  # trees since the last timing
        self._gained = 0.0  # tokens gained by these trees

    def begin_call(self, context: int) -> None:
        self._gained = 0.0
        self._moved = self._timed_at > 0 and abs(context - self._timed_at) > FAR_POSITIONS

    @property
    def is_due(self) -> bool:
        return self._trees >= MAX_TREES_BETWEEN or self._moved

    def count_plain(self) -> None:
        self._trees = 0

    def count_tree(self, gained: float) -> None:
        self._trees += 1
        self._gained += gained

    def expire(self) -> None:
        """Make the next step plain, to time a plain step again."""
        self._trees = MAX_TREES_BETWEEN

    def time(self, seconds: float, budget: ExplorationBudget) -> float:
        """Learn from the `seconds`, drafting excluded, of a step that verified only the root; correct the `budget`.

        Returns the factor by which to rescale all step costs: 1 unless the context is far from the last timing's.
        """
        self._timed_at = self.context
        gained, self._gained = self._gained, 0.0
        known = self.seconds
        if self._moved and min(seconds, known) > 0.0:
            self.seconds, self._moved = seconds, False
            budget.seconds *= seconds / known
            return seconds / known
        if known <= 0:
            self.seconds = max(seconds, 0.0)
            budget.forgive(self.seconds)
        elif 0.0 < seconds < OUTDATED * known:
            self.seconds = seconds
            budget.reprice(seconds)
        else:
            seconds = min(seconds, INTERRUPTED * known)
            self.seconds += (PLAIN_DOWN if seconds < known else PLAIN_UP) * (seconds - known)
            budget.excuse(gained * (seconds - known))  # plain steps are slower now, so the trees gained more
        return 1.0


class RowProgress:
    """Measures a batch's progress by its slowest row, which ends last; a lag of `LAG_TOKENS` is ignored."""

    def __init__(self) -> None:
        self.written: list[int] = []  # tokens of each row, finished or not, in this call; empty before a step

    def begin_call(self) -> None:
        self.written = []

    def add(self, record: StepRecord) -> float:
        """Add a step's tokens, and return the progress, in tokens, of the rows that the step decoded."""
        if len(self.written) != len(record.emitted):
            self.written = [0] * len(record.emitted)
        writing = [row for row, count in enumerate(record.emitted) if count]
        before = self._of(writing)
        for row in writing:
            self.written[row] += record.emitted[row]
        return self._of(writing) - before

    def _of(self, rows: list[int]) -> float:
        """Return the progress of `rows`: the tokens of the slowest plus `LAG_TOKENS`, but at most the mean tokens."""
        written = [self.written[row] for row in rows]
        return min(min(written) + LAG_TOKENS, sum(written) / len(written)) if written else 0.0
