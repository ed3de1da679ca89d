"""Records a head's drafts at every position of texts, and simulates policies on the recordings without models."""

from .fitted_policy import fitted_policy
from .outcomes import HeldOutcomes, OutcomeTable, TextOutcomes
from .ranked_text import RankedText, depths_of
from .recorded_text import MOST_NODES, RecordedText, record_pools
from .replayed_decoding import decode_again, replay_policy


__all__ = [
    "MOST_NODES",
    "HeldOutcomes",
    "OutcomeTable",
    "RecordedText",
    "RankedText",
    "TextOutcomes",
    "decode_again",
    "depths_of",
    "fitted_policy",
    "record_pools",
    "replay_policy",
]
