"""Policies: who decides how a step drafts."""

from .action_grid import ActionGrid
from .auto import AutoPolicy
from .costs import RunningCosts
from .fixed import FixedPolicy
from .guard import Guard
from .protocol import Level, Observation, Policy, Witness
from .resps import ReSpSConfig, ReSpSPolicy
from .saving import SavedPolicy
from .throughput import ThroughputPolicy


__all__ = [
    "ActionGrid",
    "AutoPolicy",
    "FixedPolicy",
    "Guard",
    "Level",
    "Observation",
    "Policy",
    "ReSpSConfig",
    "ReSpSPolicy",
    "RunningCosts",
    "SavedPolicy",
    "ThroughputPolicy",
    "Witness",
    "default_policy",
]


def default_policy() -> Policy:
    """What `policy="auto"` means: the best we know for somebody who trained nothing."""
    return Guard(ThroughputPolicy())
