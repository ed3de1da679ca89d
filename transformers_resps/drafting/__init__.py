"""Draft sources, which users pass as `assistant_model`, and drafters, which a source makes for each call."""

from .cache import DraftCache, Entries
from .drafter import Committed, Drafter, DraftRequest
from .source import DraftCall, DraftSource, FileReading, LevelSource, TrainableSource
from .step_model import ALL, Places, StepModel, TrainableModel, Wanted, at_wanted


__all__ = ["ALL", "Committed", "DraftCache", "DraftCall", "DraftRequest", "DraftSource", "Drafter", "Entries"]
__all__ += ["FileReading", "LevelSource", "Places", "StepModel", "TrainableModel", "TrainableSource", "Wanted"]
__all__ += ["at_wanted"]
