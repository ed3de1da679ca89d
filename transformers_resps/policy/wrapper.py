# mypy: disable-error-code="override"
# Properties take the place of attributes: what the wrapped policy tells of itself may change.
"""The base class of policies around another one."""

from torch import Tensor

from ..telemetry.report import StepRecord
from ..tree import DraftTree, TreeShape
from .costs import RunningCosts
from .identity import Identity
from .policy import Level, Observation, Policy


class PolicyWrapper(Policy):
    """Decides as the wrapped `policy`, and tells of itself what that one tells; a subclass overrides what it changes.

    Args:
        policy: the wrapped one.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def needs_head(self) -> bool:
        return self.policy.needs_head

    @property
    def uses_lookup(self) -> bool:
        return self.policy.uses_lookup

    @property
    def needs_drafted_match(self) -> bool:
        return self.policy.needs_drafted_match

    @property
    def grows(self) -> bool:
        return self.policy.grows

    @property
    def probes_head(self) -> bool:
        return self.policy.probes_head

    @property
    def costs(self) -> RunningCosts | None:
        return self.policy.costs

    @property
    def target_identity(self) -> Identity | None:
        return self.policy.target_identity

    @property
    def head_identity(self) -> Identity | None:
        return self.policy.head_identity

    @property
    def is_confident(self) -> bool:
        return self.policy.is_confident

    def check_identity(self, *, target: Identity | None = None, head: Identity | None = None) -> None:
        self.policy.check_identity(target=target, head=head)

    def choose(self, observation: Observation) -> TreeShape:
        return self.policy.choose(observation)

    def grow(self, level: Level) -> bool:
        return self.policy.grow(level)

    def size(self, scores: Tensor, levels: Tensor) -> int:
        return self.policy.size(scores, levels)

    def on_verified(self, tree: DraftTree, path: Tensor, tokens: Tensor) -> None:
        self.policy.on_verified(tree, path, tokens)

    def observe(self, record: StepRecord) -> None:
        self.policy.observe(record)
