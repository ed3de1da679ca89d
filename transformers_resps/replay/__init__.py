"""Recorded texts, and what any policy would have done on them. Models run while a text is recorded, never after."""

from .fitted_policy import fitted_policy
from .outcomes import Headroom, HeldOutcomes, Oracle, OutcomeTable, TextOutcomes
from .recorded_text import RecordedText, record_pools
from .replay_text import ReplayText, record_text
from .replayed_decoding import RecordedDrafter, ReplayedStep, decode_again, replay_policy


__all__ = [
    "Headroom",
    "HeldOutcomes",
    "Oracle",
    "OutcomeTable",
    "RecordedDrafter",
    "RecordedText",
    "ReplayText",
    "ReplayedStep",
    "TextOutcomes",
    "decode_again",
    "fitted_policy",
    "record_pools",
    "record_text",
    "replay_policy",
]
