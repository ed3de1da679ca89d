"""Trainers of draft heads and policies, in the manner of TRL."""

from ..data.conversations import load_conversations, read_conversations
from ..data.draft_vocabulary import DraftVocabulary, choose_draft_vocabulary, vocabulary_of
from ..data.examples import Example, make_example, make_examples, split_examples
from ..head import pair_identity
from ..replay.fitted_policy import fitted_policy
from ..replay.oracle import Headroom, Oracle
from ..replay.outcomes import OutcomeTable, TextOutcomes
from ..replay.recorded_text import RecordedText, record_pools
from ..replay.replay_text import ReplayText, StepSeconds, record_text, replay
from ..replay.replayed_decoding import StepCosts, replay_policy
from .feature_cache import CachedFeatures, ExampleDataset
from .head_config import DraftHeadTrainingConfig
from .head_trainer import DraftHeadTrainer, save_head
from .live_rollouts import LiveRollouts
from .policy_config import PolicyTrainingConfig
from .policy_trainer import PolicyTrainer
from .rollouts import ReplayRollouts, Rollouts
from .simulated_decoding import simulated_tau
from .target_features import FrozenTarget


__all__ = [
    "CachedFeatures",
    "DraftHeadTrainer",
    "DraftHeadTrainingConfig",
    "DraftVocabulary",
    "Example",
    "ExampleDataset",
    "FrozenTarget",
    "Headroom",
    "LiveRollouts",
    "Oracle",
    "OutcomeTable",
    "PolicyTrainer",
    "PolicyTrainingConfig",
    "RecordedText",
    "ReplayRollouts",
    "ReplayText",
    "Rollouts",
    "StepCosts",
    "StepSeconds",
    "TextOutcomes",
    "choose_draft_vocabulary",
    "fitted_policy",
    "load_conversations",
    "make_example",
    "make_examples",
    "pair_identity",
    "read_conversations",
    "record_pools",
    "record_text",
    "replay",
    "replay_policy",
    "save_head",
    "simulated_tau",
    "split_examples",
    "vocabulary_of",
]
