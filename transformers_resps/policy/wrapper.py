"""A policy around another one. Knows what policies tell of themselves: nothing of what they decide."""

from collections.abc import Callable

from .costs import RunningCosts
from .protocol import Policy


class PolicyWrapper(Policy):
    """Says of itself what the wrapped `policy` says, as listed in `Policy`; a subclass decides."""

    policy: Policy

    @property
    def needs_head(self) -> bool:
        return bool(getattr(self.policy, "needs_head", True))

    @property
    def looks_up(self) -> bool:
        return bool(getattr(self.policy, "looks_up", True))

    @property
    def reads_foreseen(self) -> bool:
        return bool(getattr(self.policy, "reads_foreseen", True))

    @property
    def check_identity(self) -> Callable[..., None] | None:
        return getattr(self.policy, "check_identity", None)

    @property
    def glances(self) -> bool:
        return bool(getattr(self.policy, "glances", False))

    @property
    def is_confident(self) -> bool:
        return bool(getattr(self.policy, "is_confident", False))

    @property
    def costs(self) -> RunningCosts | None:
        costs = getattr(self.policy, "costs", None)
        return costs if isinstance(costs, RunningCosts) else None
