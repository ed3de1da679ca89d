"""Policies: they decide how each step drafts."""

from .acceptance_model import AcceptanceModel, PlattScaling
from .action_grid import ActionGrid
from .auto import PolicyCache, default_policy
from .base import Level, Observation, Policy, PolicyWrapper, ask_shape, choose_shape, count_nodes, wants_level
from .costs import CostModel, CostTable, RunningCosts
from .fixed import FixedPolicy
from .guard import BaselineGuard
from .resps import ReSpSConfig, ReSpSPolicy
from .saving import AutoPolicy, SavedPolicy
from .throughput import ThroughputPolicy


__all__ = [
    "ActionGrid",
    "AutoPolicy",
    "FixedPolicy",
    "BaselineGuard",
    "CostModel",
    "CostTable",
    "PolicyCache",
    "Level",
    "PlattScaling",
    "AcceptanceModel",
    "Observation",
    "Policy",
    "PolicyWrapper",
    "ReSpSConfig",
    "ReSpSPolicy",
    "RunningCosts",
    "SavedPolicy",
    "ThroughputPolicy",
    "ask_shape",
    "choose_shape",
    "count_nodes",
    "default_policy",
    "wants_level",
]
