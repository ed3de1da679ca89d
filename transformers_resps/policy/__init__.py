"""Policies: they decide how each step drafts."""

from .action_grid import ActionGrid
from .auto import AutoPolicy
from .costs import RunningCosts
from .decisions import ask_shape, choose_shape, count_nodes, wants_level
from .fixed import FixedPolicy
from .guard import Guard
from .kept import KeptPolicies, default_policy
from .node_odds import LogisticMap, NodeOdds
from .protocol import Level, Observation, Policy, Witness
from .resps import ReSpSConfig, ReSpSPolicy
from .saving import SavedPolicy
from .throughput import ThroughputPolicy
from .wrapper import PolicyWrapper


__all__ = [
    "ActionGrid",
    "AutoPolicy",
    "FixedPolicy",
    "Guard",
    "KeptPolicies",
    "Level",
    "LogisticMap",
    "NodeOdds",
    "Observation",
    "Policy",
    "PolicyWrapper",
    "ReSpSConfig",
    "ReSpSPolicy",
    "RunningCosts",
    "SavedPolicy",
    "ThroughputPolicy",
    "Witness",
    "ask_shape",
    "choose_shape",
    "count_nodes",
    "default_policy",
    "wants_level",
]
