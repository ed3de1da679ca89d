"""What heads and policies learn from: conversations, examples, draft vocabularies, and which prompts were used."""

from .conversations import Conversation, load_conversations, read_conversations
from .draft_vocabulary import DraftVocabulary, choose_draft_vocabulary, vocabulary_of
from .examples import Example, make_example
from .preparation import prepare_dataset
from .prompt_tokens import to_tokens
from .splits import split_conversations
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
    "read_conversations",
    "read_training_prompts",
    "split_conversations",
    "to_tokens",
    "training_prompts_of",
    "vocabulary_of",
    "write_training_prompts",
]
