"""Trainers for draft heads and policies, used like those of TRL."""

from .features import FrozenTarget
from .head_config import DraftHeadTrainingConfig
from .head_trainer import DraftHeadTrainer, save_head
from .policy_config import PolicyTrainingConfig
from .policy_trainer import PolicyTrainer, RolloutTrainer, fit_policy
from .rollouts import LiveRollouts, ReplayRollouts, Rollouts
from .tau import simulated_tau


__all__ = [
    "DraftHeadTrainer",
    "DraftHeadTrainingConfig",
    "FrozenTarget",
    "LiveRollouts",
    "PolicyTrainer",
    "PolicyTrainingConfig",
    "ReplayRollouts",
    "RolloutTrainer",
    "Rollouts",
    "fit_policy",
    "save_head",
    "simulated_tau",
]
