"""Who proposes tokens: the source that a user passes, the drafter of one call, and what sources of levels share."""

from .cache import DraftCache
from .drafter import Committed, Drafter, DraftRequest
from .source import DraftCall, DraftSource, LevelSource, Reading, TrainableSource
from .step_model import Entries, Places, StepModel, TrainableModel, Wanted, at_wanted


__all__ = [
    "Committed",
    "DraftCache",
    "DraftCall",
    "DraftRequest",
    "DraftSource",
    "Drafter",
    "Entries",
    "LevelSource",
    "Places",
    "Reading",
    "StepModel",
    "TrainableModel",
    "TrainableSource",
    "Wanted",
    "at_wanted",
]
