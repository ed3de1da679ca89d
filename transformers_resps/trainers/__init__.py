"""Trainers of draft heads, in the manner of TRL."""

from .conversations import load_conversations, read_conversations
from .draft_vocabulary import DraftVocabulary, choose_draft_vocabulary
from .examples import Example, make_example, make_examples
from .feature_cache import CachedFeatures, ExampleDataset
from .head_config import DraftHeadTrainingConfig
from .head_trainer import DraftHeadTrainer, save_head
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
    "choose_draft_vocabulary",
    "load_conversations",
    "make_example",
    "make_examples",
    "read_conversations",
    "save_head",
    "simulated_tau",
]
