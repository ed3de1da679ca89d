"""The `Policy` base class: which questions a policy answers, and what it sees and learns from.

A policy sees trees and records, never a head or a model, so that any drafter can make the observations.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

from torch import Tensor

from ..telemetry.report import StepRecord
from ..tree import DraftTree, Pricing, TreeShape
from .costs import RunningCosts


Identity = Mapping[str, Any]  # JSON values that identify a target or a head

# Limits of a step's memory. Published trees verify 60 nodes of 710 candidates.
MAX_NODES = 4096
MAX_CANDIDATES = 2**20


@dataclass(frozen=True, slots=True)
class Observation:
    """The state of decoding that a policy sees before a step is drafted.

    Attributes:
        features: `[b, F]` the hidden states that the drafter takes from the target, concatenated, at the newest
            processed position, in the target's dtype; `None` if it takes none.
        context_length: positions of the sequence so far, padding included.
        step: 0 for the first decision in a call of `generate`.
        room: tokens that the sequence may still gain; a deeper tree is cut.
        prefix_accept_probs: looks up the end of the sequence in the text and in memories. It returns P(the path to a
            node is accepted) of the best 16 nodes, falling; `[]` without a match. Batches: the mean over rows,
            weighted by `row_weights` (ragged), or the minimum (lockstep). During the `size` of a policy that weighs
            lookup it covers only nodes that the drafter's pool lacks, which are less likely.
        prompt_seconds: seconds that head and lookup took for the prompt; in no record.
        row_weights: value of one token of each row, 1.0 on average; empty if all are equal. Rows that lag weigh more,
            because a batch ends with its slowest row.
        pricing: the cost of a step beside its nodes.
        can_draft: whether there is a head, or another source of levels.
        drafts_at_once: whether one pass drafts all levels. `grow` is then not asked, and width and depth cost nothing.
        most_levels: maximum number of levels; `None` for any.
        row_count: rows that are decoded.
        device_type: device of the target, such as "cpu".
        row_accept_probs: like `prefix_accept_probs`, for each row; `None` if all rows get equally many nodes.
        shared: callable for `size`; for each row, the nodes of the pool that lookup found, too.
    """

    features: Tensor | None
    context_length: int
    step: int
    room: int
    prefix_accept_probs: Callable[[], list[float]]
    prompt_seconds: float = 0.0
    row_weights: Sequence[float] = ()
    pricing: Pricing = Pricing()
    can_draft: bool = True
    drafts_at_once: bool = False
    most_levels: int | None = None
    row_count: int = 1
    device_type: str = "cpu"
    row_accept_probs: Callable[[], list[list[float]]] | None = None
    shared: Callable[[], list[list[int]]] = list

    @property
    def node_price(self) -> int:
        """Nodes that a step costs more if each row gets one more."""
        return self.row_count if self.pricing.packs_rows else 1

    def looked_up(self, most: int, least_prob: float) -> int:
        """Nodes that a step costs more with at most `most` looked-up ones of at least this probability."""
        if self.row_accept_probs is None:
            return most * self.node_price
        return sum(prob >= least_prob for row in self.row_accept_probs() for prob in row[:most])


@dataclass(frozen=True, slots=True)
class Level:
    """A drafted level; a policy decides from it whether to draft the next."""

    depth: int  # levels drafted so far
    scores: Tensor  # [b, k] fp32 cumulative log probabilities of the nodes that would get children next


class Policy(ABC):
    """Decides how each step drafts. Subclass it, write `choose`, and override `grow`, `size` and `observe` as needed.

    A policy affects speed only: whatever it decides, the output stays the target's own. Set the attributes in the
    class or on the object; some may change in `choose`.

    Attributes:
        needs_head: false if it works without a head.
        uses_lookup: false if it never uses lookup nodes or `Observation.prefix_accept_probs`; the prompt is then not
            indexed.
        needs_drafted_match: false if it ignores `StepRecord.drafted_match`, which then stays 0.
        grows: false if it never stops between two levels. All levels are then drafted in one go, which suits
            accelerators, and `grow` is not asked.
        probes_head: true if it learns from drafts that are not verified. `BaselineGuard` then limits these apart.
        least_lookup_prob: looked-up nodes of lower probability are not verified. `size` may change it, so that nodes
            of head and lookup compete.
        weighs_lookup: whether `size` compares looked-up nodes with the draft: a node that the drafter lacks is less
            likely, and one that both have counts once.
        discounts: added to the scores of each level before the best nodes are picked; never rising, and deeper levels
            get the last one. `size` sees the sum.
        costs: the step costs that it learns itself, shared with `BaselineGuard`; `None` if it learns none.
        target_identity: the target that it was trained for, from `pair_identity`; `None` for any.
        head_identity: the same for the head, whose weights are hashed only if the policy has an identity.
    """

    needs_head: bool = True
    uses_lookup: bool = True
    needs_drafted_match: bool = True
    grows: bool = True
    probes_head: bool = False
    least_lookup_prob: float = 0.0
    weighs_lookup: bool = False
    discounts: Sequence[float] = ()
    costs: RunningCosts | None = None
    target_identity: Identity | None = None
    head_identity: Identity | None = None

    @property
    def is_confident(self) -> bool:
        """Whether its estimates rest on observed outcomes by now; `BaselineGuard` then allows larger trees."""
        return False

    @property
    def has_identity(self) -> bool:
        """Whether it was trained for one target or head."""
        return self.target_identity is not None or self.head_identity is not None

    def check_identity(self, *, target: Identity | None = None, head: Identity | None = None) -> None:
        """Raise a `ValueError` for another target or head than the policy was trained for; `None` is not compared."""
        check_same("target", self.target_identity, target)
        check_same("head", self.head_identity, head)

    def wants_head(self, rows: int, tokens: int, room: int) -> bool:
        """Return whether a call may use the head, which costs a pass over the prompt; asked once, before any step.

        If not, lookup drafts alone, and `Observation.can_draft` is false. `tokens` counts the prompt tokens of all
        rows that no earlier call has processed, `room` those that each text may gain.
        """
        return True

    @abstractmethod
    def choose(self, observation: Observation) -> TreeShape:
        """Return the shape of this step; `TreeShape.plain()` drafts nothing."""

    def grow(self, level: Level) -> bool:
        """Return whether to draft another level, up to the chosen depth. Not asked if `grows` is false."""
        return True

    def size(self, scores: Tensor, levels: Tensor) -> int | Sequence[int]:
        """Return how many nodes to verify, root included, up to `total_tokens`.

        The largest of several numbers holds for all rows unless the observation has `row_accept_probs`. `scores`
        `[b, p]` are fp32 cumulative log probabilities of the pool's nodes, every parent before its children, and
        `levels` `[p]` their levels, ascending from 1.
        """
        return scores.shape[-1] + 1

    def on_verified(self, tree: DraftTree, path: Tensor, tokens: Tensor) -> None:
        """Look at the verified tree of the unfinished rows, for instance to draw it; called before `observe`, untimed.

        `path` `[b, m]` are the accepted nodes, root first; a row that accepted fewer repeats its last one. `tokens`
        `[b, m]` are the target's picks after them.
        """
        return None

    def observe(self, record: StepRecord) -> None:
        """Learn from the record of a finished step."""
        return None

    def explain(self, steps: Sequence[StepRecord]) -> str | None:
        """Say in a sentence why most `steps` of a call (the first is the prefill) were plain, or return `None`."""
        return None

    def adopt_costs(self, costs: RunningCosts) -> None:
        """Replace the learned costs; a guard calls it when the context is far longer, or a new batch begins."""
        self.costs = costs


def _of_wrapped(name: str) -> Any:
    """Forward an attribute, which may change between steps, or a method to the wrapped policy."""
    return property(attrgetter(f"policy.{name}"))


class PolicyWrapper(Policy):
    """Forwards everything to the wrapped `policy`; a subclass overrides some."""

    needs_head: bool = _of_wrapped("needs_head")
    uses_lookup: bool = _of_wrapped("uses_lookup")
    needs_drafted_match: bool = _of_wrapped("needs_drafted_match")
    grows: bool = _of_wrapped("grows")
    probes_head: bool = _of_wrapped("probes_head")
    least_lookup_prob: float = _of_wrapped("least_lookup_prob")
    weighs_lookup: bool = _of_wrapped("weighs_lookup")
    discounts: Sequence[float] = _of_wrapped("discounts")
    costs: RunningCosts | None = _of_wrapped("costs")
    target_identity: Identity | None = _of_wrapped("target_identity")
    head_identity: Identity | None = _of_wrapped("head_identity")

    is_confident = _of_wrapped("is_confident")
    check_identity = _of_wrapped("check_identity")
    wants_head = _of_wrapped("wants_head")
    choose = _of_wrapped("choose")
    grow = _of_wrapped("grow")
    size = _of_wrapped("size")
    on_verified = _of_wrapped("on_verified")
    observe = _of_wrapped("observe")
    explain = _of_wrapped("explain")
    adopt_costs = _of_wrapped("adopt_costs")

    def __init__(self, policy: Policy) -> None:
        self.policy = policy


class Trials:
    """Retries what does not pay after `first` chances, then after twice as many each time, up to `last`."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._left = self._every = first

    def is_due(self, *, pays: bool) -> bool:
        if pays:
            self._left = self._every = self._first
            return True
        self._left -= 1
        if self._left > 0:
            return False
        self._every = min(2 * self._every, self._last)
        self._left = self._every
        return True


def choose_shape(policy: Policy, observation: Observation, proposable_tokens: int) -> TreeShape:
    """Ask a policy for a shape, and cut it to the room and to the tokens that the head can propose."""
    shape = ask_shape(policy, observation).within(observation.room - 1)
    if proposable_tokens == 0:
        return TreeShape(1, 0, 1, shape.lookup)
    width = min(shape.top_k, shape.total_tokens - 1, proposable_tokens)
    candidates = width + (shape.depth - 1) * width**2 if shape.asks_head else 0
    if candidates > MAX_CANDIDATES or min(shape.total_tokens, candidates + 1) > MAX_NODES:
        raise ValueError(
            f"{policy!r} chose {shape} with up to {candidates} candidates, but a step is limited to {MAX_CANDIDATES} "
            f"candidates and {MAX_NODES} nodes. Return a smaller shape from `choose`; published trees have 60 nodes."
        )
    return shape


def ask_shape(policy: Policy, observation: Observation) -> TreeShape:
    """Ask a policy for a shape and check its type."""
    shape = policy.choose(observation)
    if not isinstance(shape, TreeShape):
        raise ValueError(
            f"{policy!r} returned {shape!r} from `choose`. Return a `TreeShape`; `TreeShape.plain()` drafts nothing."
        )
    return shape


def wants_level(policy: Policy, level: Level) -> bool:
    """Ask a policy whether to draft another level."""
    answer = policy.grow(level)
    try:
        return bool(answer)
    except (TypeError, ValueError, RuntimeError) as error:  # an array or a tensor of several values
        raise ValueError(f"{policy!r} returned {answer!r} from `grow`. Return True or False.") from error


def count_nodes(policy: Policy, scores: Tensor, levels: Tensor) -> list[int]:
    """Ask a policy how many nodes of each row to verify; below 1 means the root alone."""
    answer, rows = cast(Any, policy.size(scores, levels)), len(scores)
    try:
        counts = list(map(int, answer)) if isinstance(answer, list | tuple) else [int(answer)] * rows
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"{policy!r} returned {answer!r} from `size`. Return an integer; 1 verifies the root alone."
        ) from error
    if len(counts) != rows:
        raise ValueError(
            f"{policy!r} returned {len(counts)} numbers from `size` for {rows} rows. Return one for each."
        )
    return counts


def check_identity_values(what: str, value: Any) -> None:
    """Refuse a value that is neither an identity nor `None`."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"The {what} that a policy was trained with must be a mapping, got {value!r}. Pass what "
            "`transformers_resps.heads.pair_identity(target, head)` returns, or leave it out."
        )


def check_same(what: str, trained: Identity | None, used: Identity | None) -> None:
    """Refuse an identity that contradicts the one of training; keys that one side lacks are skipped."""
    if trained is None or used is None:
        return
    # A model's path differs between machines and does not identify it
    shared = [key for key in trained if key in used and key != "name_or_path"]
    wrong = [f"{key} {trained[key]!r} (here {used[key]!r})" for key in shared if trained[key] != used[key]]
    if wrong:
        raise ValueError(
            f"This policy was trained with the {what} {_name(trained)}, but is used with {_name(used)}: it needs "
            f"{', '.join(wrong)}. Load the policy of this {what}, or train one with `PolicyTrainer`."
        )


def _name(identity: Identity) -> str:
    return str(identity.get("name_or_path") or "without a name")
