"""The EAGLE-3 draft head, which Transformers' Auto classes know once this room is loaded."""

from transformers import AutoConfig, AutoModel

from .config import DraftHeadConfig
from .identity import parameter_fingerprint
from .model import Attend, BoundHead, DraftHead, Rope, pair_identity


__all__ = [
    "Attend",
    "BoundHead",
    "DraftHead",
    "DraftHeadConfig",
    "Rope",
    "pair_identity",
    "parameter_fingerprint",
]

AutoConfig.register(DraftHeadConfig.model_type, DraftHeadConfig, exist_ok=True)
AutoModel.register(DraftHeadConfig, DraftHead, exist_ok=True)
