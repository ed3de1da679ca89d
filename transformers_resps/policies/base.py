"""The `Policy` base class: the methods that decoding calls on a policy, and the data that it passes to them.

A policy gets trees and records, never a head or a model, so it works with any drafter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import attrgetter, mul
from typing import Any, cast

from torch import Tensor

from ..telemetry.report import StepRecord
from ..tree import DraftTree, Pricing, TreeShape
from .costs import RunningCosts


Identity = Mapping[str, Any]  # JSON values that identify a target or a head

# Upper bounds that limit the memory of a step. Published trees verify 60 nodes, picked from 710 candidates.
MAX_NODES = 4096
MAX_CANDIDATES = 2**20


@dataclass(frozen=True, slots=True)
class Observation:
    """The state of decoding that a policy sees before a step is drafted.

    Attributes:
        features: `[b, F]`, in the target's dtype: the target's hidden states at the newest processed position, from
            the layers that the drafter reads, concatenated; `None` if the drafter reads none.
        context_length: number of positions in the sequence so far, padding included.
        step: index of the coming step in this call of `generate`, from 0; the prefill does not count.
        room: number of tokens that the sequence may still gain; a deeper tree is cut.
        prefix_accept_probs: a function that runs prompt lookup. It returns the acceptance probabilities of the (up to
            16) likeliest nodes, in falling order; `[]` if nothing matches. A ragged batch gets the mean over rows,
            weighted by `row_weights`; a batch in lockstep the values of the row whose first node is least likely. In
            `size` with `weighs_lookup`, it leaves out nodes that were also drafted and lowers the other values.
        prompt_seconds: seconds that head and lookup spent on the prompt; `observe` gets no record of the prefill.
        row_weights: value of one token of each row, 1.0 on average; empty if all are equal. Rows that lag weigh more,
            because a batch ends with its slowest row.
        pricing: facts, apart from the number of nodes, that determine what a step costs.
        can_draft: whether there is a head or another drafter, not only lookup.
        drafts_at_once: whether one pass drafts all levels. Then `grow` is not called; larger drafts take no longer.
        most_levels: maximum number of levels; `None` for no maximum.
        row_count: number of rows that are still decoded.
        device_type: type of the target's device, such as "cpu".
        row_accept_probs: like `prefix_accept_probs`, for each row; `None` if all rows get equally many nodes.
        shared: a function for `size`; returns the indices of each row's drafted nodes that lookup also proposes.
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
        """Number of nodes added to a step's cost if every row gets one more node: `row_count`, or 1 with padding."""
        return self.row_count if self.pricing.packs_rows else 1

    def looked_up(self, most: int, least_prob: float) -> int:
        """Return how many nodes lookup adds to a step's cost: up to `most` per row, of probability >= `least_prob`."""
        if self.row_accept_probs is None:
            return most * self.node_price
        return sum(prob >= least_prob for row in self.row_accept_probs() for prob in row[:most])


@dataclass(frozen=True, slots=True)
class Level:
    """The newest drafted level: `Policy.grow` gets it to decide whether another level is drafted."""

    depth: int  # levels drafted so far
    scores: Tensor  # [b, k] fp32 cumulative log probabilities of the nodes that would get children next


class Policy(ABC):
    """Chooses each step's draft tree. Subclass it, write `choose`, and override `grow`, `size`, `observe` as needed.

    A policy affects only the speed: the target picks every output token, whatever the policy decides. Set the
    attributes in the class or on the object; `choose` may change some of them.

    Attributes:
        needs_head: false if the policy works without a head.
        uses_lookup: false if the policy never uses looked-up nodes or `Observation.prefix_accept_probs`; the prompt is
            then not indexed.
        needs_drafted_match: false if the policy ignores `StepRecord.drafted_match`, which then stays 0.
        grows: false if the policy never stops between two levels. All levels are then drafted without a pause, which
            suits accelerators, and `grow` is not called.
        probes_head: true if the policy learns from unverified drafts, too. `BaselineGuard` then limits drafting and
            verifying separately.
        least_lookup_prob: looked-up nodes of lower probability are not verified. `size` may change it.
        weighs_lookup: whether `size` compares looked-up nodes with drafted ones. A looked-up node that the drafter did
            not propose then gets a lower probability, and a node that both propose counts once.
        discounts: number per level that is added to the scores of its nodes before the best nodes are picked. The
            numbers never rise with depth; deeper levels use the last number. `size` gets the new scores.
        costs: the step costs that the policy learns, which `BaselineGuard` uses, too; `None` if it learns none.
        target_identity: the target that the policy was trained for, from `pair_identity`; `None` for any target.
        head_identity: the same for the head. Weights are hashed only if the policy has one of these identities.
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
        """Whether the policy has seen enough outcomes for its estimates; `BaselineGuard` then allows larger trees."""
        return False

    @property
    def has_identity(self) -> bool:
        """Whether the policy was trained for a particular target or head."""
        return self.target_identity is not None or self.head_identity is not None

    def check_identity(self, *, target: Identity | None = None, head: Identity | None = None) -> None:
        """Raise `ValueError` if the policy was trained for another target or head; a value of `None` fits any."""
        check_same("target", self.target_identity, target)
        check_same("head", self.head_identity, head)

    def wants_head(self, rows: int, tokens: int, room: int) -> bool:
        """Return whether this call of `generate` may use the head, which must then process the prompt.

        This is called once, before the first step. If it returns false, only lookup drafts (`Observation.can_draft` is
        false). `tokens` counts the new prompt tokens of all `rows`; `room` is how many tokens each row may gain.
        """
        return True

    @abstractmethod
    def choose(self, observation: Observation) -> TreeShape:
        """Return the shape of the coming step's draft tree; `TreeShape.plain()` drafts nothing."""

    def grow(self, level: Level) -> bool:
        """Return whether to draft another level, up to the chosen depth. Not called if `grows` is false."""
        return True

    def size(self, scores: Tensor, levels: Tensor) -> int | Sequence[int]:
        """Return how many nodes to verify, root included, up to `total_tokens`: one number, or one for each row.

        Unless the observation has `row_accept_probs`, all rows get the largest number. `scores` `[b, p]` are the fp32
        cumulative log probabilities of all candidate nodes, every parent before its children; `levels` `[p]` are
        their levels, ascending from 1.
        """
        return scores.shape[-1] + 1

    def on_verified(self, tree: DraftTree, path: Tensor, tokens: Tensor) -> None:
        """Inspect the verified tree of the unfinished rows, for instance to draw it.

        This is called before `observe`, and its time is not measured. `path` `[b, m]` holds the accepted nodes, root
        first; a row that accepted fewer repeats its last node. `tokens` `[b, m]` are the target's tokens after them.
        """
        return None

    def observe(self, record: StepRecord) -> None:
        """Learn from the record of a finished step."""
        return None

    def explain(self, steps: Sequence[StepRecord]) -> str | None:
        """Return a sentence on why most `steps` of a call were plain, or `None`; `steps[0]` is the prefill."""
        return None

    def adopt_costs(self, costs: RunningCosts) -> None:
        """Replace `self.costs`; `BaselineGuard` calls this after a large change of context or for a new batch."""
        self.costs = costs


class PolicyWrapper(Policy):
    """Forwards all methods and attributes to the wrapped `policy`; subclasses override some of them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def choose(self, observation: Observation) -> TreeShape:
        return self.policy.choose(observation)


for _forwarded in vars(Policy).keys() - vars(PolicyWrapper).keys():
    if not _forwarded.startswith("_"):
        setattr(PolicyWrapper, _forwarded, property(attrgetter(f"policy.{_forwarded}")))  # read anew at each access


class Trials:
    """Schedules retries of an option that does not pay: after `first` checks, doubled at each retry, up to `last`."""

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
    """Return the shape that a policy chooses, reduced to the tokens that may still be generated.

    `proposable_tokens` is the number of different tokens that the drafter can propose; with 0 the shape only looks up.
    Raises a `ValueError` if the shape has more candidates or nodes than a step may have.
    """
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


def mean_odds(rows: list[list[float]], row_weights: Sequence[float]) -> list[float]:
    """Average the rows' lists entry by entry; missing entries count as 0, and no `row_weights` as equal ones."""
    if len(rows) == 1:
        return rows[0]
    weights = row_weights or [1.0] * len(rows)
    return [sum(map(mul, weights, column)) / len(rows) for column in zip_longest(*rows, fillvalue=0.0)]


def ask_shape(policy: Policy, observation: Observation) -> TreeShape:
    """Return the shape that a policy chooses; raises `ValueError` if it is no `TreeShape`."""
    shape = policy.choose(observation)
    if not isinstance(shape, TreeShape):
        raise ValueError(
            f"{policy!r} returned {shape!r} from `choose`. Return a `TreeShape`; `TreeShape.plain()` drafts nothing."
        )
    return shape


def wants_level(policy: Policy, level: Level) -> bool:
    """Return whether a policy wants another level; raise `ValueError` if `grow` returned no truth value."""
    answer = policy.grow(level)
    try:
        return bool(answer)
    except (TypeError, ValueError, RuntimeError) as error:  # an array or a tensor of several values
        raise ValueError(f"{policy!r} returned {answer!r} from `grow`. Return True or False.") from error


def count_nodes(policy: Policy, scores: Tensor, levels: Tensor) -> list[int]:
    """Return how many nodes of each row a policy wants to verify; raise `ValueError` if `size` returned no numbers."""
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
    """Raise `ValueError` if `value` is neither a mapping nor `None`; `what` names it in the message."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"The {what} that a policy was trained with must be a mapping, got {value!r}. Pass what "
            "`transformers_resps.heads.pair_identity(target, head)` returns, or leave it out."
        )


def check_same(what: str, trained: Identity | None, used: Identity | None) -> None:
    """Raise `ValueError` if two identities differ in a key that both have; `what` is "target" or "head"."""
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
