"""A policy around another one."""

from collections.abc import Callable

from .costs import RunningCosts
from .protocol import Policy


class PolicyWrapper(Policy):
    """Has the attributes of the wrapped `policy`, as listed in `Policy`; a subclass makes the decisions."""

    policy: Policy

    @property
    def needs_head(self) -> bool:
        return bool(getattr(self.policy, "needs_head", True))

    @property
    def uses_lookup(self) -> bool:
        return bool(getattr(self.policy, "uses_lookup", True))

    @property
    def needs_drafted_match(self) -> bool:
        return bool(getattr(self.policy, "needs_drafted_match", True))

    @property
    def check_identity(self) -> Callable[..., None] | None:
        return getattr(self.policy, "check_identity", None)

    @property
    def probes_head(self) -> bool:
        return bool(getattr(self.policy, "probes_head", False))

    @property
    def is_confident(self) -> bool:
        return bool(getattr(self.policy, "is_confident", False))

    @property
    def costs(self) -> RunningCosts | None:
        costs = getattr(self.policy, "costs", None)
        return costs if isinstance(costs, RunningCosts) else None
