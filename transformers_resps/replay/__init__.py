"""Recorded texts, and what any policy would have done on them. Models run while a text is recorded, never after."""

from .fitted_policy import fitted_policy
from .outcomes import HeldOutcomes, Oracle, OutcomeTable, TextOutcomes
from .ranked_text import RankedText, depths_of
from .recorded_text import MOST_NODES, RecordedText, record_pools
from .replayed_decoding import RecordedDrafter, ReplayedStep, decode_again, replay_policy


__all__ = [
    "MOST_NODES",
    "HeldOutcomes",
    "Oracle",
    "OutcomeTable",
    "RecordedDrafter",
    "RecordedText",
    "RankedText",
    "ReplayedStep",
    "TextOutcomes",
    "decode_again",
    "depths_of",
    "fitted_policy",
    "record_pools",
    "replay_policy",
]
