# mypy: disable-error-code="override"
# Properties take the place of attributes: what the wrapped policy tells of itself may change.
"""The base class of a policy that decides with the help of another one."""

from torch import Tensor

from ..tree import DraftTree
from .costs import RunningCosts
from .identity import Identity
from .policy import Policy


class PolicyWrapper(Policy):
    """Tells of itself what the wrapped `policy` tells; a subclass makes the decisions.

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

    def on_verified(self, tree: DraftTree, path: Tensor, tokens: Tensor) -> None:
        self.policy.on_verified(tree, path, tokens)
