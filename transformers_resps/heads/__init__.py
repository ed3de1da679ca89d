"""The EAGLE-3 draft head, which Transformers' Auto classes know once this room is loaded."""

from transformers import AutoConfig, AutoModel

from .cache import DraftCache
from .config import DraftHeadConfig
from .identity import parameter_fingerprint
from .model import Attend, BoundHead, DraftHead, Rope, pair_identity
from .source import DraftSource, Entries, Places, StepModel, TrainableModel, TrainableSource, Wanted


__all__ = [
    "Attend",
    "BoundHead",
    "DraftCache",
    "DraftHead",
    "DraftHeadConfig",
    "DraftSource",
    "Entries",
    "Places",
    "Rope",
    "StepModel",
    "TrainableModel",
    "TrainableSource",
    "Wanted",
    "pair_identity",
    "parameter_fingerprint",
]

AutoConfig.register(DraftHeadConfig.model_type, DraftHeadConfig, exist_ok=True)
AutoModel.register(DraftHeadConfig, DraftHead, exist_ok=True)
