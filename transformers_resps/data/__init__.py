"""Prepare training data: conversations, tokenized examples, draft vocabularies, hashes of training prompts."""

from .conversations import Conversation, load_conversations, to_tokens
from .draft_vocabulary import DraftVocabulary, choose_draft_vocabulary, vocabulary_of
from .preparation import Example, make_example, prepare_dataset
from .training_prompts import (
    TRAINING_PROMPTS,
    prompt_fingerprint,
    read_training_prompts,
    training_prompts_of,
    write_training_prompts,
)


__all__ = [
    "TRAINING_PROMPTS",
    "Conversation",
    "DraftVocabulary",
    "Example",
    "choose_draft_vocabulary",
    "load_conversations",
    "make_example",
    "prepare_dataset",
    "prompt_fingerprint",
    "read_training_prompts",
    "to_tokens",
    "training_prompts_of",
    "vocabulary_of",
    "write_training_prompts",
]
