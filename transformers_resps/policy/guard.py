"""Never slower than plain: drafting may lose only a small share of the time, and must earn the rest back."""

import copy
from typing import Any, Self

from torch import Tensor

from ..telemetry import StepRecord
from ..tree import TreeShape
from .costs import INTERRUPTED, RunningCosts
from .decisions import ask_shape, count_nodes, wants_level
from .protocol import Level, Observation, Policy
from .saving import SavedPolicy, check_known, class_of
from .wrapper import PolicyWrapper


_SHARE = 0.008  # of all seconds that drafting may lose for good
_LOAN = 0.2  # plain steps that a call may lose before it has lasted
_EVIDENCE_LOAN = 1.2  # plain steps more, once the odds rest on outcomes
_TRIAL_LOAN = 0.5  # plain steps more for finding out at all
_EVIDENCE_PER_TOKEN, _TRIAL_PER_TOKEN = 0.015, 0.005  # the same for short texts: plain steps per token that is left
_MOST_SAVED, _MOST_CARRIED = 16.0, 4.0  # plain steps that drafting won: within a call, and into the next one
_REVALUED = 1.0  # plain steps that are left of savings once plain steps turn out to be far cheaper
_LUCK = 2.0  # tokens by which a row of a batch may lag behind the mean without being thought slower
_HIGHER, _LOWER = 0.2, 0.5  # weight of a plain step's newest time: what a slow moment credits trees with is lost
_REMEASURE = 64  # drafted steps after which a plain one is timed again
_OUTDATED = 0.7  # of what a forward was expected to take: less shows that the machine or the batch is another one
_FAR = 256  # positions of context between two texts after which forwards are timed anew: attention is part of them
_UNKNOWN_TREE, _UNKNOWN_LEVEL = 0.5, 0.1  # plain steps that the first tree and the first level may cost beyond a guess


class Guard(PolicyWrapper, SavedPolicy):
    """Lets `policy` draft while the seconds it may lose are there; otherwise steps are cut down, in the end to plain.

    An account in seconds: a drafted step pays in what its tokens would have taken plainly and pays out what it took,
    and a small share of all time is added. Of a batch those of the row that lags behind count, with which the call
    ends; a lag of two tokens behind the mean is taken for bad luck, and may be lost for good. Once half its rows have
    ended, debts are forgiven as at the beginning of a text. A step may not cost more than the account would bear if
    nothing of it were accepted, so the first steps with a new head are glances at one level, then small trees, none of
    more than twice the nodes of any before. A call of `n` tokens loses at most `0.7 + 0.008 n` plain steps on a head
    that never showed itself, 1.2 more when it disappoints after good evidence (less where little text is left), what
    this call won with it, up to 16, and earlier ones, up to 4, and once, should nodes be ruinous, what the first tree
    of two cost. A forward of a known size that took far longer than ever is thought to have been interrupted, whether
    or not it drafted: what it took beyond is nobody's loss. A debt ends drafting, and is forgiven as far as the next
    plain step is slower, too: the machine was. What was spent on the prompt before the first decision
    (`Observation.prompt_seconds`) is gone either way and not in the account.

    Args:
        policy: any; what it learned, and the guard's own measurements, stay between calls of `generate`.

    Raises:
        ValueError: it is no policy.
    """

    policy_type = "guard"

    def __init__(self, policy: Policy) -> None:
        if isinstance(policy, type) or not isinstance(policy, Policy):
            raise ValueError(
                f"Got Guard({policy!r}), but a guard watches a policy: an object with the methods `choose`, `grow`, "
                "`size` and `observe`. Pass one, for example `Guard(ThroughputPolicy())`, which is what 'auto' means."
            )
        self.policy = policy
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
        # Costs and a plain step's seconds before the first row of this batch ended: the next one's begin with them
        self._of_all_rows: tuple[RunningCosts, float] | None = None

    def __repr__(self) -> str:
        return f"Guard({self.policy!r})"

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
        self._lookup_budget = self._account + evidence  # a lookup's record is kept while steps are plain
        confident = evidence if self.is_confident else 0.0
        self._tree_budget = self._account + confident
        self._budget = self._tree_budget + trial
        if not self.glances:
            self._tree_budget = self._budget
        return self._affordable(shape)

    def grow(self, level: Level) -> bool:
        if self._nodes == 1 or self._drafting(level.depth + 1) > self._budget:  # a glance is one level
            return False
        self._levels = level.depth + 1
        return wants_level(self.policy, level)

    def size(self, scores: Tensor) -> int:
        return min(count_nodes(self.policy, scores), self._nodes)

    def observe(self, record: StepRecord) -> None:
        nodes, seconds, gained = record.verified, max(record.step_seconds, 0.0), self._gained(record)
        if self._of_all_rows is None and record.decoded_rows < len(self._written):
            self._of_all_rows = copy.deepcopy(self._known), self._plain_seconds
        if 2 * record.decoded_rows <= self._rows:  # another batch: what was too dear for all may pay for some
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
        self._account = min(self._account + _SHARE * seconds, _MOST_SAVED * self._plain_seconds)
        if self._learns_costs:
            levels = max(self._levels, 1) if record.shape.asks_head else 0
            times = (record.verify_seconds, record.draft_seconds, record.step_seconds)
            self._known.add(nodes, levels, *times, rows=record.decoded_rows)
        self.policy.observe(record)

    def _begin(self) -> None:
        """A new text: debts are forgiven, savings are cut, and costs of a far shorter or longer one don't hold."""
        self._written, self._rows, self._gained_since = [], 0, 0.0
        if self._of_all_rows is not None:
            costs, self._plain_seconds = self._of_all_rows
            self._known.go_back_to(costs)
            self._of_all_rows = None
        self._moved = self._timed_at > 0 and abs(self._context - self._timed_at) > _FAR
        least, most = _LOAN * self._plain_seconds, _MOST_CARRIED * self._plain_seconds
        self._account = min(max(self._account, least), most)

    def _gained(self, record: StepRecord) -> float:
        """Tokens by which the rows came forward that still write."""
        emitted = (record.emitted,) if isinstance(record.emitted, int) else record.emitted
        if len(self._written) != len(emitted):
            self._written = [0] * len(emitted)
        writing = [row for row, count in enumerate(emitted) if count]
        before = self._progress(writing)
        for row in writing:
            self._written[row] += emitted[row]
        return self._progress(writing) - before

    def _progress(self, rows: list[int]) -> float:
        """Tokens that the row behind the others has written, or the mean, while it may only have had less luck."""
        written = [self._written[row] for row in rows]
        return min(min(written) + _LUCK, sum(written) / len(written)) if written else 0.0

    def _settle(self, record: StepRecord, seconds: float, gained: float) -> None:
        """Book a step that drafted."""
        if record.verified == 1:  # a glance costs its draft: how fast the machine just then was is not its doing
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
            self._account = min(self._account, _REVALUED * seconds)  # it was saved in another currency
        else:
            seconds = min(seconds, INTERRUPTED * self._plain_seconds)
            self._revalue(gained * (seconds - self._plain_seconds))
            weight = _LOWER if seconds < self._plain_seconds else _HIGHER
            self._plain_seconds += weight * (seconds - self._plain_seconds)

    def _revalue(self, lost: float) -> None:
        """Forgive a debt as far as trees lost seconds to a machine on which plain steps, too, had become slower."""
        if self._account < 0.0:
            self._account = min(self._account + max(lost, 0.0), 0.0)

    def _affordable(self, shape: TreeShape) -> TreeShape:
        """The largest part of `shape` whose cost the budget bears if none of it is accepted."""
        most = 2 * self._known.largest_tree  # what a tree twice as large costs can be told, more is a leap
        lookup = min(shape.lookup, most - 1)
        while lookup and self._verifying(1 + lookup) > self._lookup_budget:
            lookup -= 1
        drafted = TreeShape(1, 0, 1, lookup)
        if not shape.asks_head:
            return drafted
        glances = self.glances
        depth = shape.depth if not glances else 1  # who looks at each level can stop; others pay for all at once
        while depth and self._drafting(depth) > self._budget:
            depth -= 1
        nodes = min(shape.total_tokens, most - lookup) if depth else 1
        drafting = self._drafting(depth)
        while nodes > 1 and self._verifying(nodes + lookup) + drafting > self._tree_budget:
            nodes -= 1
        if depth == 0 or (nodes == 1 and not glances):
            return drafted
        self._levels, self._nodes = 1, nodes
        return TreeShape(
            shape.total_tokens if glances else nodes, shape.depth if glances else depth, shape.top_k, lookup
        )

    def _verifying(self, nodes: int) -> float:
        """Seconds that verifying `nodes` takes beyond a plain step; a guess on the safe side before any tree was."""
        if nodes <= 1:
            return 0.0
        unknown = 0.0 if self._known.knows_trees else _UNKNOWN_TREE * self._plain_seconds
        return self._known.verify_seconds(nodes) - self._known.verify_seconds(1) + unknown

    def _drafting(self, levels: int) -> float:
        if self._known.knows_head:
            return self._known.draft_seconds(levels)
        return levels * _UNKNOWN_LEVEL * self._plain_seconds

    def to_config(self) -> dict[str, Any]:
        """The guarded policy's, with its type.

        Raises:
            ValueError: it cannot be saved.
        """
        if not isinstance(self.policy, SavedPolicy):
            raise ValueError(
                f"Got a guarded {type(self.policy).__name__}, but only policies with `save_pretrained` can be saved. "
                "Subclass `SavedPolicy` instead of `Policy`."
            )
        return {"policy": {"policy_type": self.policy.policy_type, **self.policy.to_config()}}

    def state_tensors(self) -> dict[str, Tensor]:
        return self.policy.state_tensors() if isinstance(self.policy, SavedPolicy) else {}

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        check_known(cls.policy_type, config, ("policy",))
        if not isinstance(config["policy"], dict) or not isinstance(config["policy"].get("policy_type"), str):
            raise ValueError(
                f"The config of a guard holds the policy {config['policy']!r}, but it needs the one that is guarded, "
                "with its `policy_type`. Download or save it again."
            )
        values = dict(config["policy"])
        if values["policy_type"] == cls.policy_type:
            raise ValueError("The config of a guard holds another guard, but one is enough. Save the policy again.")
        return cls(class_of(values.pop("policy_type")).from_saved(values, tensors))
