"""Trainers of draft heads and policies, in the manner of TRL."""

from .head_config import DraftHeadTrainingConfig
from .head_saving import save_head
from .head_trainer import DraftHeadTrainer
from .live_rollouts import LiveRollouts
from .policy_config import PolicyTrainingConfig
from .policy_trainer import PolicyTrainer
from .rollout_trainer import RolloutTrainer
from .rollouts import ReplayRollouts, Rollouts
from .simulated_decoding import simulated_tau
from .target_features import FrozenTarget


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
