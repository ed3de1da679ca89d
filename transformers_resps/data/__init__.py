"""What heads and policies learn from: conversations, examples, draft vocabularies, and which prompts were used."""

from .conversations import Conversation, load_conversations, read_conversations
from .draft_vocabulary import DraftVocabulary, choose_draft_vocabulary, vocabulary_of
from .examples import Example, make_example, make_examples, split_examples
from .prompt_tokens import to_tokens
from .training_prompts import TRAINING_PROMPTS, prompt_fingerprint, read_training_prompts, write_training_prompts


__all__ = [
    "TRAINING_PROMPTS",
    "Conversation",
    "DraftVocabulary",
    "Example",
    "choose_draft_vocabulary",
    "load_conversations",
    "make_example",
    "make_examples",
    "prompt_fingerprint",
    "read_conversations",
    "read_training_prompts",
    "split_examples",
    "to_tokens",
    "vocabulary_of",
    "write_training_prompts",
]
