"""Trainers of draft heads and policies, in the manner of TRL."""

from .features import FrozenTarget
from .head_config import DraftHeadTrainingConfig
from .head_trainer import DraftHeadTrainer, save_head, simulated_tau
from .policy_config import PolicyTrainingConfig
from .policy_trainer import PolicyTrainer
from .rollout_trainer import RolloutTrainer
from .rollouts import LiveRollouts, ReplayRollouts, Rollouts


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
    "save_head",
    "simulated_tau",
]
