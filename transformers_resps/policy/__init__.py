"""Policies: they decide how each step drafts."""

from .acceptance_model import AcceptanceModel, PlattScaling
from .action_grid import ActionGrid
from .auto import AutoPolicy
from .cost_model import CostModel
from .costs import RunningCosts
from .decisions import ask_shape, choose_shape, count_nodes, wants_level
from .fixed import FixedPolicy
from .guard import BaselineGuard
from .policy import Level, Observation, Policy
from .policy_cache import PolicyCache, default_policy
from .resps import ReSpSConfig, ReSpSPolicy
from .saving import SavedPolicy
from .throughput import ThroughputPolicy
from .wrapper import PolicyWrapper


__all__ = [
    "ActionGrid",
    "AutoPolicy",
    "FixedPolicy",
    "BaselineGuard",
    "CostModel",
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
