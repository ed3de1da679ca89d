"""Policies: who decides how a step drafts."""

from .fixed import FixedPolicy
from .protocol import Level, Observation, Policy


__all__ = ["FixedPolicy", "Level", "Observation", "Policy"]
