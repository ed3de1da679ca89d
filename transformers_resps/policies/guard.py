"""Fall back to plain decoding where drafting loses time, around any policy.

Source: conservative exploration (Wu et al., "Conservative Bandits", 2016, arXiv 1602.04282): an action is taken only
if the budget covers its worst outcome. The baseline is plain decoding, the worst outcome that nothing is accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Self

from torch import Tensor

from ..telemetry.report import StepRecord
from ..tree import TreeShape
from .base import Level, Observation, Policy, PolicyWrapper, Trials, ask_shape, count_nodes, wants_level
from .costs import INTERRUPTED, RunningCosts
from .saving import SavedPolicy, check_known, class_of


# What may be lost, in plain steps
SHARE = 0.008  # of all seconds, for good: far below the 3% that a call may lose, because timing has errors
START_STEPS = 0.2  # by every call from its start, so that a head is tried again after a bad call
TRIAL_STEPS = 0.5  # on top, by trying drafting at all: with `START_STEPS` it pays for a first tree
TRIAL_STEPS_PER_TOKEN = 0.005  # limits it near the end, where few tokens are left to earn it back
CONFIDENT_STEPS = 1.2  # on top, once the policy is confident: the best tree must be affordable after bad luck, too
CONFIDENT_STEPS_PER_TOKEN = 0.015  # limits it near the end
MAX_EARNED_STEPS = 16.0  # of what drafting has won
MAX_CARRIED_STEPS = 4.0  # of that by the next call, whose text may be another
MAX_REPRICED_STEPS = 1.0  # of that when plain steps turn out far cheaper: it was earned at the old price
LAG_TOKENS = 2.0  # a row of a batch may lag so much behind the mean before it counts as slower, not as unlucky

# When and how a plain step is timed again
PLAIN_UP, PLAIN_DOWN = 0.2, 0.5  # weights of a new time above or below: a slow moment must not credit trees for long
MAX_TREES_BETWEEN = 64  # drafted steps
OUTDATED = 0.7  # times the expected seconds: less shows that the machine or the batch has changed
FAR_POSITIONS = 256  # a context that differs by more makes attention take longer or shorter

# Whether the head should read the prompt of a call
HEAD_MEMORY = 0.995  # weight of what it earned, after each token of a text
ENOUGH_TOKENS = 128.0  # of texts that it could draft, before it is left out of a call
MAX_LEFT_OUT = 32  # calls from one trial to the next
PROMPT_WEIGHT = 0.3  # of the newest time in what reading a prompt takes

EXPLAINED_STEPS = 8  # that a call makes at least, for a reason why most were plain

# Added to the guessed costs of the first tree and level, in plain steps: a mask or new code may cost more than a node
UNKNOWN_TREE_STEPS, UNKNOWN_LEVEL_STEPS = 0.5, 0.1

_PLAIN = TreeShape.plain()


class BaselineGuard(PolicyWrapper, SavedPolicy):
    """Falls back to plain decoding when drafting loses time.

    Keeps a budget in seconds. A drafted step earns what its tokens would have taken plainly and pays its duration;
    0.8% of all time is added for exploration. A step whose worst case, that nothing is accepted, exceeds the budget is
    made smaller, down to a plain step. So a new head is asked for one level at first, and only nodes that the step
    computes anyway are verified; then for small trees, each of at most twice the nodes of any before.

    Bound: a call of `n` tokens loses at most `0.7 + 0.008 n` plain steps on a head of which nothing was ever
    accepted. In addition it may lose:

    - 1.2 plain steps if a head disappoints after good evidence, less near the end of the sequence;
    - what drafting has won, up to 16 plain steps from this call and 4 from earlier calls;
    - once, what the first tree of two nodes takes, on a machine where a second node is extremely expensive.

    Not in the budget: the excess of a forward that takes far longer than its size ever did, which counts as an
    interruption; and what the head's reading of the prompt takes (`Observation.prompt_seconds`). A head that earned
    too little in earlier calls of as many rows to pay for that does not read the next prompt, see `HeadAccount`. While
    the budget is negative, nothing is drafted. It recovers if the next plain step is slower too: then the machine was.

    Batches: the tokens of the slowest row count. A lag of up to two tokens counts as chance, and its cost may be lost
    for good. Once half of the rows have ended, losses are forgiven, as at the beginning of a call.

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
        self._own_costs = RunningCosts()  # in use if the policy learns none
        known = self._known
        self._plain = PlainClock(known.step_seconds(_PLAIN, 0) if known.knows_plain else 0.0)
        self._budget = ExplorationBudget()
        self._progress, self._head = RowProgress(), HeadAccount()
        self._limits = StepLimits(0.0, 0.0, 0.0)  # of this step
        self._levels, self._nodes = 0, 1  # drafted in this step; at most verified in it, as they are priced
        self._node_price = self._width = 1  # see `Observation`; of its levels
        self._rows = 0  # that were decoded when losses were forgiven last
        # Costs and a plain step's seconds before the first row of this batch ended; the next batch starts with them
        self._of_all_rows: tuple[RunningCosts, float] | None = None

    def __repr__(self) -> str:
        return f"BaselineGuard({self.policy!r})"

    @property
    def _known(self) -> RunningCosts:
        return self._own_costs if self.policy.costs is None else self.policy.costs

    def _adopt(self, costs: RunningCosts) -> None:
        """Go on with these costs; those of the policy are its own to replace."""
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
        self._plain.begin_step(observation.context_length)
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
        is_probe = self._nodes == 1  # draft-only, of one level
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
        """The nodes by which a step over rows of so many, each at most `most`, is priced."""
        return 1 + sum(max(min(count, most) - 1, 0) for count in counts) * self._node_price // len(counts)

    def observe(self, record: StepRecord) -> None:
        seconds, gained = max(record.step_seconds, 0.0), self._progress.add(record)
        self._follow_rows(record)
        if record.verified == 1:
            self._time_plain(seconds - max(record.draft_seconds, 0.0))
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
        """Costs are again those of all rows, and losses are forgiven."""
        self._progress.begin_call()
        self._rows = 0
        if self._of_all_rows is not None:
            costs, self._plain.seconds = self._of_all_rows
            self._adopt(costs)
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
        if record.verified == 1:  # a probe pays for its draft alone, not for the machine's speed at that moment
            self._plain.count_plain()
            earned = -max(record.draft_seconds, 0.0)
        else:
            interrupted = record.verify_seconds - self._known.uninterrupted(record.computed, record.verify_seconds)
            earned = gained * self._plain.seconds - (seconds - interrupted)
            self._plain.count_tree(gained)
        self._budget.seconds += earned
        if record.shape.asks_head:
            self._head.earned += earned

    def _time_plain(self, seconds: float) -> None:
        timing = self._plain.time(seconds)
        match timing.change:
            case PlainChange.FIRST:
                self._budget.forgive(self._plain.seconds)
            case PlainChange.MOVED:
                self._adopt(self._known.rescaled(timing.factor))
                self._budget.seconds *= timing.factor
            case PlainChange.CHEAPER:
                self._budget.reprice(self._plain.seconds)
            case PlainChange.USUAL:
                self._budget.excuse(timing.excess)

    def _affordable(self, shape: TreeShape, observation: Observation) -> TreeShape:
        """The largest part of `shape` that the budget can pay for if nothing is accepted."""
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
        # A policy that does not stop in between pays for all levels at once, a block has one price
        depth = 1 if by_level else shape.depth
        while depth and self._drafting(shape.top_k, 1 if at_once else depth) > self._limits.total:
            depth = 0 if at_once else depth - 1
        nodes = min(1 + (shape.total_tokens - 1) * price, most - added) if depth else 1
        drafting = self._drafting(shape.top_k, min(depth, 1) if at_once else depth)
        free = self._verifying(1 + added)  # nodes that cost nothing are verified: they may earn their draft
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
        self._levels = 1 if self.grows or at_once else deepest  # `grow` counts further levels, where asked
        if probes_head:
            return TreeShape(shape.total_tokens, deepest, shape.top_k, lookup)
        return TreeShape(1 + -(-(nodes - 1) // price), depth, shape.top_k, lookup)

    def _verifying(self, nodes: int) -> float:
        """Seconds that verifying `nodes` takes beyond a plain step; a cautious guess before any tree was measured."""
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
    """Seconds that one step may lose if nothing of it is accepted."""

    total: float  # with drafting and verifying a tree of the head
    tree: float  # the same, for a policy that can learn from drafting alone
    lookup: float  # with verifying a looked-up chain


class ExplorationBudget:
    """Bounds what exploration loses against plain decoding.

    Bound: if no step loses more than `limits` gave for it, a call of `n` tokens, as measured by its plain seconds,
    loses at most what it began with, `SHARE` of its seconds, and the largest step's extra: `TRIAL_STEPS`, and
    `CONFIDENT_STEPS` where the policy is confident. It begins with `START_STEPS`, or with up to `MAX_CARRIED_STEPS`
    that earlier calls have won.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # that may be lost now; negative while more was lost than was there

    def begin_call(self, plain_seconds: float) -> None:
        """Start a call: losses are forgiven, and little of the gains is carried over."""
        self.forgive(plain_seconds)
        self.seconds = min(self.seconds, MAX_CARRIED_STEPS * plain_seconds)

    def limits(self, room: int, plain_seconds: float, *, is_confident: bool, probes_head: bool) -> StepLimits:
        """What the next step may lose. Of a policy that learns from drafting alone, verifying waits for confidence."""
        trial = min(TRIAL_STEPS, TRIAL_STEPS_PER_TOKEN * room) * plain_seconds
        confident = min(CONFIDENT_STEPS, CONFIDENT_STEPS_PER_TOKEN * room) * plain_seconds
        lookup = self.seconds + confident  # a lookup's record also grows in plain steps
        tree = self.seconds + (confident if is_confident else 0.0)
        total = tree + trial
        return StepLimits(total, tree if probes_head else total, lookup)

    def end_step(self, step_seconds: float, plain_seconds: float) -> None:
        """Add the share of a step's time; limit what is kept."""
        self.seconds = min(self.seconds + SHARE * step_seconds, MAX_EARNED_STEPS * plain_seconds)

    def forgive(self, plain_seconds: float) -> None:
        """Forget losses: what they say no longer holds."""
        self.seconds = max(self.seconds, START_STEPS * plain_seconds)

    def excuse(self, lost_seconds: float) -> None:
        """Forget losses as far as plain steps would have lost these seconds, too."""
        if self.seconds < 0.0:
            self.seconds = min(self.seconds + max(lost_seconds, 0.0), 0.0)

    def reprice(self, plain_seconds: float) -> None:
        """Plain steps take only so long now: gains were earned at another price."""
        self.seconds = min(self.seconds, MAX_REPRICED_STEPS * plain_seconds)


class HeadAccount:
    """Knows whether a head earns what reading the prompt takes it, by earlier calls of as many rows.

    One that does not is left out of a call, and of more each time that it was tried again in vain. It may earn in all
    the room of a text, which few texts fill: where it helps, leaving it out costs far more than a prompt.
    """

    def __init__(self) -> None:
        self.earned = 0.0  # seconds by which the steps of this call that asked it were faster than plain decoding
        self.tokens = 0.0  # that each text of this call has gained
        self.is_left_out = self._is_refused = False  # whether this call could have had it; whether the coming one may
        self._calls: dict[int, _HeadCalls] = {}  # by their rows
        self._open: _HeadCalls | None = None  # of this call, if it has a head
        self._asked, self._unread = _HeadCalls(), 1  # of the coming call
        self._token_seconds = 0.0  # of reading a token of a prompt

    def pays(self, rows: int, unread: int, room: int) -> bool:
        """Whether the head should read the `unread` tokens of a coming call's prompts; see `Policy.wants_head`."""
        self._close()
        self._asked, self._unread = self._calls.setdefault(rows, _HeadCalls()), unread
        self._is_refused = not self._asked.is_tried(room, self._token_seconds * unread)
        return not self._is_refused

    def begin_call(self, prompt_seconds: float | None) -> None:
        """A call begins, in which reading the prompts took so long; `None` where it has no head."""
        self._close()
        self.is_left_out, self._is_refused = self._is_refused and prompt_seconds is None, False
        if prompt_seconds is None:
            return
        self._open, known = self._asked, self._token_seconds
        each = max(prompt_seconds, 0.0) / self._unread
        each = min(each, INTERRUPTED * known) if known > 0.0 else each
        self._token_seconds += (PROMPT_WEIGHT if known > 0.0 else 1.0) * (each - known)

    def _close(self) -> None:
        if self._open is not None:
            self._open.add(self.earned, self.tokens)
        self._open, self.earned, self.tokens = None, 0.0, 0.0


@dataclass(slots=True)
class _HeadCalls:
    """What the head earned in calls of the same number of rows: decayed sums."""

    earned: float = 0.0  # seconds
    tokens: float = 0.0
    trials: Trials = field(default_factory=lambda: Trials(2, MAX_LEFT_OUT))

    def add(self, earned: float, tokens: float) -> None:
        """Take in a call in which it read the prompt."""
        past = HEAD_MEMORY**tokens
        self.earned, self.tokens = past * self.earned + earned, past * self.tokens + tokens

    def is_tried(self, room: int, price: float) -> bool:
        """Whether it should read the next prompt, which takes `price` seconds."""
        is_unknown = self.tokens < ENOUGH_TOKENS
        return self.trials.is_due(pays=is_unknown or self.earned / self.tokens * room > price)


class PlainChange(Enum):
    """What a new time of a plain step means."""

    FIRST = auto()  # none was known
    MOVED = auto()  # the context is far longer or shorter, so all steps have changed by the same factor
    CHEAPER = auto()  # so much that what was known is outdated
    USUAL = auto()


@dataclass(frozen=True, slots=True)
class PlainTiming:
    """What timing a plain step showed."""

    change: PlainChange
    factor: float = 1.0  # new over known seconds, for `MOVED`
    # Seconds that trees since the last timing were credited too little for their tokens, for `USUAL`, because the
    # machine had become slower; negative if faster
    excess: float = 0.0


class PlainClock:
    """Knows the `seconds` of a plain step, 0 before one was timed, and when to time one again."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._context = self._timed_at = 0  # positions: of this step, and where a plain step was timed last
        self._moved = False  # from there to another context, since this call began
        self._trees = 0  # drafted since a plain step was timed
        self._gained = 0.0  # tokens that they gained

    def begin_call(self, context: int) -> None:
        self._gained = 0.0
        self._moved = self._timed_at > 0 and abs(context - self._timed_at) > FAR_POSITIONS

    def begin_step(self, context: int) -> None:
        self._context = context

    @property
    def is_due(self) -> bool:
        return self._trees >= MAX_TREES_BETWEEN or self._moved

    def count_plain(self) -> None:
        self._trees = 0

    def count_tree(self, gained: float) -> None:
        """A step verified a tree, which gained so many tokens."""
        self._trees += 1
        self._gained += gained

    def expire(self) -> None:
        """What is known is outdated: make the next step plain."""
        self._trees = MAX_TREES_BETWEEN

    def time(self, seconds: float) -> PlainTiming:
        """Take in what a forward over the root alone took, with all but drafting around it."""
        self._timed_at = self._context
        gained, self._gained = self._gained, 0.0
        known = self.seconds
        if self._moved and min(seconds, known) > 0.0:
            self.seconds, self._moved = seconds, False
            return PlainTiming(PlainChange.MOVED, factor=seconds / known)
        if known <= 0:
            self.seconds = max(seconds, 0.0)
            return PlainTiming(PlainChange.FIRST)
        if 0.0 < seconds < OUTDATED * known:
            self.seconds = seconds
            return PlainTiming(PlainChange.CHEAPER)
        seconds = min(seconds, INTERRUPTED * known)
        self.seconds += (PLAIN_DOWN if seconds < known else PLAIN_UP) * (seconds - known)
        return PlainTiming(PlainChange.USUAL, excess=gained * (seconds - known))


class RowProgress:
    """How far the rows of a call have come. A call ends with its slowest row, which may have had some bad luck."""

    def __init__(self) -> None:
        self._written: list[int] = []  # tokens of each row since the call began

    @property
    def row_count(self) -> int:
        """Finished rows included; 0 before the first step of a call."""
        return len(self._written)

    def begin_call(self) -> None:
        self._written = []

    def add(self, record: StepRecord) -> float:
        """Tokens by which the unfinished rows advanced in this step."""
        if len(self._written) != len(record.emitted):
            self._written = [0] * len(record.emitted)
        writing = [row for row, count in enumerate(record.emitted) if count]
        before = self._of(writing)
        for row in writing:
            self._written[row] += record.emitted[row]
        return self._of(writing) - before

    def _of(self, rows: list[int]) -> float:
        """Tokens of the slowest row plus the allowed lag, but at most the mean over rows."""
        written = [self._written[row] for row in rows]
        return min(min(written) + LAG_TOKENS, sum(written) / len(written)) if written else 0.0
